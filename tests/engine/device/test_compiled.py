"""A private model that torch.compile compiles, on a device by its default compiler."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from tests.engine.device.support import backward, error_of, private, truth
from tests.engine.support import values
from tests.engine.test_compiled import Graphs, every_kind
from tests.engine.truth import relative_error

#: the default compiler writes kernels for a GPU; for the CPU it would need a C++ compiler
COMPILER = {"cpu": "aot_eager", "cuda": "inductor"}


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_compiled(
    dtype: torch.dtype | None, device: torch.device, fresh_compiler: None, full_float32: None
) -> None:
    model, x = every_kind(), values(4, 3, 6)
    expected, bound = truth(model, x)
    x = x.float().to(device)
    made = private(model, x, device, bound)
    graphs = Graphs(COMPILER[device.type])
    made = replace(made, wrapped=torch.compile(made.wrapped, backend=graphs))
    for _ in range(2):
        made.optimizer.zero_grad()
        backward(made, x, dtype)
        found = made.released()
        tolerance = 1e-4 if dtype is None else 2.0**-6
        assert error_of(found, expected) < tolerance
        assert relative_error(found.norms, expected.norms) < tolerance
    assert graphs.found, "nothing was compiled"
    made.optimizer.step()
