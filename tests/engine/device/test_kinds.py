"""Every kind of layer on a device: one sample at a time in float64 on the CPU is the truth."""

from __future__ import annotations

import pytest
import torch

from dpkernels.ops.registry import all_ops
from tests.engine.device.kinds import KINDS, model_of
from tests.engine.device.support import Private, backward, error_of, private, truth
from tests.engine.truth import assert_same, relative_error

#: relative error that the roundings of inputs, weights, activations and backprops may leave
BFLOAT16 = 2.0**-6


def assert_on_kernels(ran: dict[str, set[str]], device: torch.device) -> None:
    """Ops ran, and on a GPU on our kernels wherever there is one: else the test proves nothing."""
    assert ran
    if device.type != "cuda":
        return
    for name, backends in ran.items():
        kernels = {b for b in ("triton", "cuda") if all_ops()[name].why_not(b) is None}
        assert not kernels or backends <= kernels, f"{name} ran on {backends}"


def steps(
    made: Private, x: torch.Tensor, ran: dict[str, set[str]], dtype: torch.dtype | None = None
) -> None:
    """Two backward passes: the first has a trial run, and after it the plan is settled."""
    backward(made, x, dtype)
    made.optimizer.zero_grad()
    ran.clear()
    backward(made, x, dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_float32(
    kind: str, device: torch.device, full_float32: None, ran: dict[str, set[str]]
) -> None:
    model, x = model_of(kind)
    expected, bound = truth(model, x)
    made = private(model, x, device, bound)
    steps(made, x.to(device), ran)
    assert_same(made.released(), expected, 1e-4)
    assert_on_kernels(ran, device)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_autocast(kind: str, device: torch.device, ran: dict[str, set[str]]) -> None:
    model, x = model_of(kind)
    expected, bound = truth(model, x)
    made = private(model, x, device, bound)
    steps(made, x.to(device), ran, torch.bfloat16)
    found = made.released()
    assert {g.dtype for g in found.gradients.values()} == {torch.float32}
    assert error_of(found, expected) < BFLOAT16
    assert relative_error(found.norms, expected.norms) < BFLOAT16
    assert_on_kernels(ran, device)
