"""What the built CUDA extension holds: architectures, registers, spills and matrix instructions."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from dpkernels.ops import native

EXTENSION = native.load("cuda")
pytestmark = pytest.mark.skipif("was not built" in str(EXTENSION), reason=str(EXTENSION))

SMALL_CONV_THREADS = 288
LOCAL_MEMORY = {"finish_kernelIdE": 40, "normals_kernelIdE": 40}
"""Bytes per thread: the float64 sine of CUDA's library holds a table for arguments that a turn
never reaches. Nothing else may leave the registers."""


@dataclass(frozen=True)
class Kernel:
    """One kernel's resources on one architecture."""

    name: str
    architecture: str
    registers: int
    local: int


def cuobjdump(*options: str) -> str:
    """The tool's answer about the extension: the toolkit's own, or the one Triton brings."""
    tool = shutil.which("cuobjdump")
    if tool is None:
        triton = pytest.importorskip("triton", reason="no cuobjdump on PATH and no Triton")
        tool = str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")
    command = [tool, *options, EXTENSION.__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    """Every kernel on every architecture."""
    found, architecture, name = [], "", ""
    for line in cuobjdump("--dump-resource-usage").splitlines():
        if line.startswith("arch ="):
            architecture = line.split()[-1]
        elif line.strip().startswith("Function"):
            name = line.split()[1].rstrip(":")
        elif "REG:" in line:
            usage = dict(re.findall(r"\b([A-Z]+):(\d+)", line))
            local = int(usage["STACK"]) + int(usage["LOCAL"])
            found.append(Kernel(name, architecture, int(usage["REG"]), local))
    return found


def test_it_loads_without_a_gpu() -> None:
    assert not isinstance(EXTENSION, str), EXTENSION


def test_machine_code_for_every_architecture_and_ptx_for_later_ones() -> None:
    wanted = {"real": set(), "virtual": set()}
    for architecture in EXTENSION.architectures.split():
        number, kind = architecture.split("-")
        wanted[kind].add(f"sm_{number}")
    machine_code = set(re.findall(r"\.(sm_\w+)\.cubin", cuobjdump("-lelf")))
    assert machine_code == wanted["real"]
    assert set(re.findall(r"\.(sm_\w+)\.ptx", cuobjdump("-lptx"))) == wanted["virtual"]


def test_every_kernel_is_there_on_every_architecture(kernels: list[Kernel]) -> None:
    architectures = {kernel.architecture for kernel in kernels}
    assert len(kernels) == len({k.name for k in kernels}) * len(architectures)
    for part in ("finish", "factor", "chacha20", "normals", "small_conv", "combine"):
        assert any(f"{part}_kernel" in kernel.name for kernel in kernels), part


def test_nothing_spills(kernels: list[Kernel]) -> None:
    allowed = {k: next((n for p, n in LOCAL_MEMORY.items() if p in k.name), 0) for k in kernels}
    assert [kernel for kernel in kernels if kernel.local > allowed[kernel]] == []


def test_registers_suffice_for_a_block(kernels: list[Kernel]) -> None:
    """A kernel that asks for more than there are cannot be launched."""
    over = [
        kernel
        for kernel in kernels
        if kernel.registers * (SMALL_CONV_THREADS if "small_conv" in kernel.name else 256) > 65536
    ]
    assert over == []


def test_small_convolutions_run_on_matrix_units() -> None:
    counts: dict[str, int] = {}
    name = ""
    for line in cuobjdump("-sass").splitlines():
        if "Function :" in line:
            name = line.split()[-1]
        elif re.search(r"\bHMMA\b", line):
            counts[name] = counts.get(name, 0) + 1
    assert len(counts) == 12
    assert all("small_conv_kernel" in name for name in counts)
