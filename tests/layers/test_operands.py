"""Operands: a part of the samples, and a piece of a packed parameter."""

from __future__ import annotations

import pytest
import torch

from dpkernels.layers.operands import (
    EmbeddingOperand,
    LinearOperand,
    Operand,
    PieceOperand,
    StoredOperand,
)
from tests.engine.support import ids, values

LINEAR = LinearOperand(values(4, 3, 5), values(4, 3, 2).cos())
OPERANDS: dict[str, Operand] = {
    "linear": LINEAR,
    "embedding": EmbeddingOperand(ids(4, 6), values(4, 6, 3), 11, 2),
    "stored": StoredOperand(values(4, 2, 3)),
    "piece": PieceOperand(LINEAR, 1, 6),
}


@pytest.mark.parametrize("name", OPERANDS)
def test_norms_sums_and_parts_are_those_of_the_gradients(name: str) -> None:
    operand = OPERANDS[name]
    grads, factor = operand.grad_sample(), torch.linspace(0.2, 1.0, 4).double()
    assert operand.samples == len(grads) == 4
    torch.testing.assert_close(operand.norm_sq(), grads.flatten(1).square().sum(1))
    assert bool((operand.norm_bound(operand.norm_sq()) >= grads.flatten(1).norm(dim=1)).all())
    expected = torch.tensordot(factor, grads, dims=1)
    torch.testing.assert_close(operand.clipped_grad(factor), expected)
    part = operand.part(slice(1, 3))
    assert part.samples == 2
    torch.testing.assert_close(part.grad_sample(), grads[1:3])
    torch.testing.assert_close(part.norm_sq(), operand.norm_sq()[1:3])


def test_the_rest_of_a_packed_parameter_is_zero() -> None:
    grads = OPERANDS["piece"].grad_sample()
    assert grads.shape == (4, 6, 5)
    assert torch.equal(grads[:, 1:3], LINEAR.grad_sample())
    assert not grads[:, 0].any()
    assert not grads[:, 3:].any()


@pytest.mark.parametrize("strategy", ["gram", "store", "recompute"])
@pytest.mark.parametrize("name", OPERANDS)
def test_the_kernel_is_the_one_that_the_strategy_runs_first(name: str, strategy: str) -> None:
    operand = OPERANDS[name]
    call = operand.kernel(strategy)
    if call is None:
        assert name == "stored"
        return
    op, arguments = call
    inner = LINEAR if name == "piece" else operand
    expected = inner.norm_sq() if strategy == "gram" else inner.grad_sample()
    torch.testing.assert_close(op(*arguments), expected)
