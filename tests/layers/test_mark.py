"""The mark on an output: it changes nothing, and hands the backprops over."""

from __future__ import annotations

import pytest
import torch

from dpkernels.layers.mark import mark
from tests.engine.support import values


@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("grad", [False, True], ids=["first layer", "inner layer"])
def test_backprops_are_handed_over_once_and_go_on(grad: bool, view: bool) -> None:
    x = values(3, 4).requires_grad_(grad)
    anchor = torch.zeros((), requires_grad=True).clone()
    seen = []
    output = 2 * x
    output = mark(
        output[:, 1:] if view else output, anchor, lambda g, saved: seen.append((g, saved)), x
    )
    assert torch.equal(output, 2 * x.detach()[:, int(view) :])
    output.relu_().square().sum().backward()
    ((backprops, saved),) = seen
    torch.testing.assert_close(backprops, 2 * output.detach())
    assert not backprops.requires_grad
    assert torch.equal(saved[0], x.detach())
    assert not saved[0].requires_grad
    if grad:
        torch.testing.assert_close(x.grad[:, int(view) :], 2 * backprops)


def test_an_output_that_no_loss_uses_hands_nothing_over() -> None:
    anchor = torch.zeros((), requires_grad=True).clone()
    output = mark(values(3, 4), anchor, lambda *_: pytest.fail("no gradient arrived"))
    assert output.requires_grad
    (2 * anchor).backward()
