"""Every op on every backend of the CPU, found as the registry finds them, on hostile arguments.

Triton's interpreter is too slow for whole tables of shapes, and CUDA needs a device: the tests of
those backends choose their shapes themselves.
"""

from __future__ import annotations

import pytest
import torch

from dpkernels.ops import sums
from dpkernels.ops.registry import all_ops, use_backend
from tests.ops import hostile
from tests.ops.compare import assert_backend

PAIRS = [
    (op, backend)
    for op in hostile.OPS
    for backend in ("library", "cpu")
    if all_ops()[op].why_not(backend) is None
]


@pytest.mark.parametrize(("op", "backend"), PAIRS)
def test_equals_the_reference(op: str, backend: str) -> None:
    for name in hostile.names(op):
        arguments = hostile.arguments(op, name)
        if all_ops()[op].why_not(backend, *arguments) is None:
            assert_backend(all_ops()[op], backend, *arguments)


@pytest.mark.parametrize(("op", "backend"), PAIRS)
def test_library_registration(op: str, backend: str) -> None:
    name = next(
        name for name in hostile.names(op) if name in ("odd", "duplicates", "2d", "5 of [9]")
    )
    with use_backend(backend):
        torch.library.opcheck(all_ops()[op]._library_op, hostile.arguments(op, name))


def test_every_other_op_draws_random_numbers_or_is_not_a_sum() -> None:
    assert set(all_ops()) - set(hostile.OPS) == {
        "chacha20_blocks_",
        "discrete_gaussians",
        "fingerprint",
        "gaussian_noise_",
        "lstm",
        "lstm_backward",
        "normalization_statistics",
        "standard_normals",
    }


def test_mutation_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm that is off by one percent fails the comparison."""
    from dpkernels.ops.linear import library

    honest = sums.squared_norms
    monkeypatch.setattr(library, "squared_norms", lambda rows: honest(rows) * 1.01)
    with pytest.raises(pytest.fail.Exception, match="elements pass"):
        test_equals_the_reference("linear_norm_sq", "library")
