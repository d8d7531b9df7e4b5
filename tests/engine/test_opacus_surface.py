"""The versions of Opacus that we stand on, and that its surface is all there.

Opacus 1.6 is the only series that has what we build on (``AbstractGradSampleHooks``, the registry
of accountants); 1.6.0 is its only release so far: both ends of the stated range are one version.
CONTRIBUTING.md says how to run the engine's tests against another one.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from importlib.metadata import version
from pathlib import Path

import opacus
import pytest
import torch
from opacus.optimizers import DPOptimizer
from torch import nn

import dpkernels
from dpkernels.engine.release.optimizer import FusedDPOptimizer

ROOT = Path(__file__).resolve().parents[2]
METHODS = [
    "__init__", "make_private", "make_private_with_epsilon", "get_epsilon", "save_checkpoint",
    "load_checkpoint", "is_compatible", "validate", "get_compatible_module",
]  # fmt: skip
#: defaults that differ on purpose (docs of PrivacyEngine)
OURS = {
    ("__init__", "accountant"): "tight",
    ("make_private", "grad_sample_mode"): "fused",
    ("make_private_with_epsilon", "grad_sample_mode"): "fused",
}


def imported_from_opacus() -> list[tuple[str, str]]:
    found = set()
    for path in (ROOT / "dpkernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("opacus"):
                found |= {(str(node.module), alias.name) for alias in node.names}
    return sorted(found)


@pytest.mark.parametrize(("module", "name"), imported_from_opacus())
def test_what_we_import_exists(module: str, name: str) -> None:
    assert hasattr(importlib.import_module(module), name)


def test_the_stated_range_holds_the_tested_version() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    low, high = re.search(r'"opacus>=([\d.]+),<([\d.]+)"', text).groups()
    pinned = re.search(r"^opacus==([\d.]+)$", (ROOT / "constraints.txt").read_text(), re.M)[1]

    def parts(text: str) -> tuple[int, ...]:
        return tuple(int(n) for n in text.split(".")[:3])

    assert parts(low) == parts(pinned), "the lower end is the pinned version that CI tests"
    assert parts(low) <= parts(version("opacus")) < parts(high)


@pytest.mark.parametrize("method", METHODS)
def test_every_argument_of_opacus_is_ours_with_its_default(method: str) -> None:
    theirs = inspect.signature(getattr(opacus.PrivacyEngine, method)).parameters
    ours = inspect.signature(getattr(dpkernels.PrivacyEngine, method)).parameters
    takes_more = any(p.kind is p.VAR_KEYWORD for p in ours.values())
    for name, parameter in theirs.items():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        if name not in ours:
            assert takes_more, f"{method}({name}=...)"
            continue
        if parameter.default is parameter.empty:
            continue
        expected = OURS.get((method, name), parameter.default)
        if name == "criterion":
            assert ours[name].default is None, "made only where Opacus' own modes ask for one"
        else:
            assert ours[name].default == expected, f"{method}({name}=...)"


def test_everything_on_opacus_optimizer_is_on_ours() -> None:
    def public(optimizer: object) -> set[str]:
        return {name for name in dir(optimizer) if not name.startswith("_")}

    def made(kind: type[DPOptimizer]) -> DPOptimizer:
        parameter = nn.Parameter(torch.zeros(2))
        return kind(
            torch.optim.Adam([parameter]), noise_multiplier=1.0, max_grad_norm=1.0,
            expected_batch_size=4,
        )  # fmt: skip

    assert public(made(DPOptimizer)) <= public(made(FusedDPOptimizer))
