"""Every Triton kernel compiles for sm_80 and sm_90 within its limits, on machines without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
MOST_REGISTERS = 255
MOST_SHARED = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that one block may use."""
MOST_STACK = 8
"""Bytes per thread: one address that waits for the end of a loop, as some compilers put it."""


@pytest.fixture(scope="module")
def lines() -> list[Any]:
    """The output of tests/ops/aot.py, run in a process that does not interpret."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.aot"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def compiled(lines: list[Any]) -> list[dict[str, Any]]:
    """One row per kernel, specialisation and architecture."""
    return lines[1:]


def test_nothing_spills(compiled: list[dict[str, Any]]) -> None:
    assert [row for row in compiled if row["stack"] > MOST_STACK] == []


def test_registers_and_shared_memory_fit(compiled: list[dict[str, Any]]) -> None:
    over = [
        row
        for row in compiled
        if row["registers"] * row["warps"] * 32 > 65536
        or row["registers"] > MOST_REGISTERS
        or row["shared"] > MOST_SHARED[row["architecture"]]
    ]
    assert over == []


def test_16_bit_products_use_the_matrix_unit(compiled: list[dict[str, Any]]) -> None:
    rows = [row for row in compiled if row["half_products"]]
    assert rows
    assert [row for row in rows if not row["matrix_unit"]] == []


def test_every_kernel_is_compiled_for_every_architecture(lines: list[Any]) -> None:
    done = {(row["kernel"], row["architecture"]) for row in lines[1:]}
    assert done == {(name, arch) for name in lines[0] for arch in MOST_SHARED}
