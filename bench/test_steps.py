"""The small cases under pytest-benchmark: ``python -m pytest bench --benchmark-autosave``.

``--benchmark-compare`` then shows what changed since the saved run.
"""

from __future__ import annotations

import pytest
import torch

from bench import cases, rivals

_CASES = cases.find([], "quick")
_RIVALS = rivals.find(["ours"])


@pytest.mark.parametrize("rival", _RIVALS, ids=lambda rival: rival.name)
@pytest.mark.parametrize("case", _CASES, ids=lambda case: case.name)
def test_step(benchmark, case: cases.Case, rival: rivals.Rival) -> None:
    torch.set_num_threads(1)
    benchmark.group = case.name
    workload = case.build(torch.device("cpu"))
    benchmark(rival.prepare(workload, rivals.Privacy(1.0, 1.0)))
