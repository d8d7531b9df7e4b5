"""The small cases under pytest-benchmark, in processor time, beside the committed run:

    python -m pytest bench --benchmark-storage=bench/results/benchmarks --benchmark-compare

``--benchmark-save=quick`` in the place of ``--benchmark-compare`` makes the run to be committed.
"""

from __future__ import annotations

import time

import pytest
import torch

from bench import cases, rivals
from bench.conftest import NOW

_CASES = [case.name for case in cases.find([], "quick")]
_RIVALS = [rival.name for rival in rivals.find(["ours"])]


@pytest.mark.benchmark(timer=time.process_time, max_time=3.0, min_rounds=5)
@pytest.mark.parametrize("rival", _RIVALS)
@pytest.mark.parametrize("case", _CASES)
def test_step(benchmark, case: str, rival: str) -> None:
    torch.set_num_threads(1)
    benchmark.group = case
    workload = cases.find([case], "")[0].build(torch.device("cpu"))
    chosen = next(r for r in rivals.RIVALS if r.name == rival)
    benchmark(chosen.prepare(workload, rivals.Privacy(1.0, 1.0)))
    if benchmark.stats is not None:
        NOW[case, rival] = benchmark.stats.stats.median
