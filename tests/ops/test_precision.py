"""PyTorch's switches of precision, the older and the newer ones, and arithmetic inside autocast."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import backends

from dpkernels import ops
from dpkernels.layers import margins
from dpkernels.ops.checks import why_not_exact
from dpkernels.ops.precision import float32_products, full_precision

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def switch() -> Iterator[Callable[[object, str, object], None]]:
    """Moves a switch; what was moved last is put back first."""
    moved: list[tuple[object, str, object]] = []

    def move(owner: object, name: str, value: object) -> None:
        moved.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    yield move
    for owner, name, value in reversed(moved):
        setattr(owner, name, value)


def found() -> dict[str, str]:
    kinds = [(device, kind) for device in ("cuda", "cpu") for kind in ("matmul", "conv")]
    return {f"{device} {kind}": float32_products(device, kind) for device, kind in kinds}


DEFAULT = {"cuda matmul": "ieee", "cuda conv": "tf32", "cpu matmul": "ieee", "cpu conv": "ieee"}


def test_the_defaults_are_pytorchs() -> None:
    assert found() == DEFAULT
    assert float32_products("cuda", "matmul", "conv") == "tf32"


@pytest.mark.parametrize(
    ("owner", "value", "changed"),
    [
        (backends.cuda.matmul, True, {"cuda matmul": "tf32"}),
        (backends.cudnn, False, {"cuda conv": "ieee"}),
    ],
)
def test_the_older_switches(switch, owner, value, changed) -> None:
    switch(owner, "allow_tf32", value)
    assert found() == DEFAULT | changed


@pytest.mark.parametrize(("stated", "rounded"), [("high", "tf32"), ("medium", "bf16")])
def test_the_older_switch_of_matrix_products(stated: str, rounded: str) -> None:
    torch.set_float32_matmul_precision(stated)
    try:
        assert found() == DEFAULT | {"cuda matmul": "tf32", "cpu matmul": rounded}
    finally:
        torch.set_float32_matmul_precision("highest")


#: what becomes of TF32 in convolutions where only what stands above them is switched off
OF_CONVOLUTIONS = "ieee" if torch.__version__ >= (2, 13) else "tf32"
NEWER_SWITCHES = {
    ("", "tf32"): dict.fromkeys(DEFAULT, "tf32"),
    ("", "ieee"): {"cuda conv": OF_CONVOLUTIONS},
    ("", "bf16"): {"cuda conv": OF_CONVOLUTIONS, "cpu matmul": "bf16", "cpu conv": "bf16"},
    ("cuda.matmul", "tf32"): {"cuda matmul": "tf32"},
    ("cudnn", "ieee"): {"cuda conv": OF_CONVOLUTIONS},
    ("cudnn.conv", "ieee"): {"cuda conv": "ieee"},
    ("mkldnn.matmul", "bf16"): {"cpu matmul": "bf16"},
    ("mkldnn.conv", "bf16"): {"cpu conv": "bf16"},
}
"""Backend and value of ``fp32_precision``, and what becomes of the defaults."""


@pytest.mark.skipif(
    not hasattr(backends.cudnn, "conv"), reason="fp32_precision is of PyTorch 2.9 and later"
)
def test_the_newer_switches() -> None:
    """In a process of its own: PyTorch forbids mixing them with the older ones."""
    script = (
        "import operator, torch\n"
        "from tests.ops.test_precision import NEWER_SWITCHES, found\n"
        "for name, value in NEWER_SWITCHES:\n"
        "    backend = operator.attrgetter(name)(torch.backends) if name else torch.backends\n"
        "    before, backend.fp32_precision = backend.fp32_precision, value\n"
        "    print(found())\n"
        "    backend.fp32_precision = before\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    for (switched, changed), line in zip(NEWER_SWITCHES.items(), lines, strict=True):
        assert ast.literal_eval(line) == DEFAULT | changed, switched


def test_margins_follow_the_switch() -> None:
    single, half = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bfloat16)
    assert margins.product_unit(single) == 0.0
    torch.set_float32_matmul_precision("high")
    try:
        assert margins.product_unit(single) == margins.product_unit(half) == 2.0**-11
        assert margins.product_unit(single.double()) == 0.0
    finally:
        torch.set_float32_matmul_precision("highest")


def test_library_sums_on_a_gpu_need_products_that_are_not_rounded(switch) -> None:
    class OnGpu(torch.Tensor):
        is_cuda = True

    operand = torch.ones(2).as_subclass(OnGpu)
    assert why_not_exact(("matmul",), operand) is None
    assert "TF32" in why_not_exact(("matmul", "conv"), operand)
    assert why_not_exact(("conv",), operand.double().as_subclass(OnGpu)) is None
    switch(backends.cudnn, "allow_tf32", False)
    assert why_not_exact(("matmul", "conv"), operand) is None
    switch(backends.cuda.matmul, "allow_tf32", True)
    assert "TF32" in why_not_exact(("matmul", "conv"), operand)


def test_arithmetic_inside_autocast_keeps_its_dtype() -> None:
    x = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with full_precision():
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16


@pytest.mark.parametrize("backend", ["reference", "library", "cpu"])
def test_ops_do_not_see_autocast(backend: str) -> None:
    """A product in half precision would be off by 2^-9; an op's result is bit for bit the same."""
    draw = torch.Generator().manual_seed(0)
    a, g = torch.randn(3, 7, 5, generator=draw), torch.randn(3, 7, 4, generator=draw)
    x, y = torch.randn(2, 3, 6, 6, generator=draw), torch.randn(2, 4, 6, 6, generator=draw)
    geometry = ([4, 3, 3, 3], [1, 1], [1, 1], [1, 1], 1)
    factor, two = torch.tensor([0.3, 1.0, 0.7]), torch.tensor([0.3, 1.0])
    calls = [
        (ops.linear_norm_sq, a, g),
        (ops.linear_grad_sample, a, g),
        (ops.linear_clipped_grad, a, g, factor),
        (ops.conv_norm_sq, x, y, *geometry),
        (ops.conv_grad_sample, x, y, *geometry),
        (ops.conv_clipped_grad, x, y, two, *geometry),
    ]
    tried = 0
    with ops.use_backend(backend):
        for op, *arguments in calls:
            if op.why_not(backend, *arguments):
                continue
            plain = op(*arguments)
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(op(*arguments), plain), op.name
            tried += 1
    assert tried >= 3
