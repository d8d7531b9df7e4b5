"""Compiles for capability 9.0, without a GPU, the Triton kernels that the bench launches there.

    python -m bench.rehearsal.fill PART PARTS

They are those of ``bench/calls.py`` and of the steps of all GPU cases. Takes every PARTS-th shape
and case, beginning with number PART (from 0), so that as many processes share the work; the kernels
go to TRITON_CACHE_DIR. The tensors have no memory: shapes, strides and dtypes are all that a kernel
is compiled by.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from bench import calls, cases, meta, timing
from bench.rehearsal import driver
from dpkernels import ops


def kernel_calls() -> list[tuple[str, Callable[[], object]]]:
    """The calls of the Triton kernels in ``bench/calls.py``, by name."""

    def call(precision: str, make: calls.Make) -> None:
        timing.allow_tf32(calls.PRECISIONS[precision][1])
        wanted = make(calls.Place(torch.device("cuda"), precision))
        if "triton" in wanted.op.candidates(*wanted.arguments):
            with ops.use_backend("triton"):
                wanted.op(*wanted.arguments)

    return [
        (f"{op} {shape} {precision}", lambda p=precision, m=make: call(p, m))
        for precision in calls.PRECISIONS
        for (op, shape), make in calls.cases("gpu").items()
    ]


def main() -> int:
    """Compile; ends with 1 if a call fails."""
    part, parts = map(int, sys.argv[1:])
    failed = 0

    def attempt(name: str, call: Callable[[], object]) -> None:
        nonlocal failed
        try:
            call()
        except Exception as error:
            failed += 1
            print(f"{name}: {type(error).__name__}: {error}", flush=True)

    launches: list[meta.Launch] = []
    for case in cases.find([], "gpu")[part::parts]:
        attempt(case.name, lambda c=case: launches.extend(meta.private_step(c).launches))
    driver.install()
    with driver.Redirect("meta"):
        for launch in launches:
            run = launch.kernel[launch.grid]
            attempt(launch.kernel.__name__, lambda r=run, x=launch: r(*x.arguments, **x.options))
        for name, call in kernel_calls()[part::parts]:
            attempt(name, call)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
