"""The small cases under pytest-benchmark, in processor time, beside the committed run:

    python -m pytest bench --benchmark-storage=bench/results/benchmarks --benchmark-compare

``--benchmark-save=quick`` in the place of ``--benchmark-compare`` makes the run to be committed.
"""

from __future__ import annotations

import time

import pytest
import torch

from bench import cases, rivals

_CASES = cases.find([], "quick")
_RIVALS = rivals.find(["ours"])


@pytest.mark.benchmark(timer=time.process_time, max_time=3.0, min_rounds=5)
@pytest.mark.parametrize("rival", _RIVALS, ids=lambda rival: rival.name)
@pytest.mark.parametrize("case", _CASES, ids=lambda case: case.name)
def test_step(benchmark, case: cases.Case, rival: rivals.Rival) -> None:
    torch.set_num_threads(1)
    benchmark.group = case.name
    workload = case.build(torch.device("cpu"))
    benchmark(rival.prepare(workload, rivals.Privacy(1.0, 1.0)))
