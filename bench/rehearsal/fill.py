"""Compiles for capability 9.0, without a GPU, the Triton kernels of ``bench/kernels.py``.

    python -m bench.rehearsal.fill PART PARTS

Takes every PARTS-th case, beginning with number PART (from 0), so that as many processes share the
work; the kernels go to TRITON_CACHE_DIR. The tensors have no memory: shapes, strides and dtypes are
all that a kernel is compiled by.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from bench.rehearsal import driver


def kernel_calls() -> list[tuple[str, Callable[[], object]]]:
    """The calls of the Triton kernels in ``bench/kernels.py``, by name."""
    from bench import kernels
    from dpkernels import ops

    def call(precision: str, make: kernels.Make) -> None:
        tf32 = kernels.PRECISIONS[precision][1]
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        wanted = make(kernels.Place(torch.device("cuda"), precision))
        if "triton" in wanted.op.candidates(*wanted.arguments):
            with ops.use_backend("triton"):
                wanted.op(*wanted.arguments)

    return [
        (f"{op} {shape} {precision}", lambda p=precision, m=make: call(p, m))
        for precision in kernels.PRECISIONS
        for (op, shape), make in kernels.cases().items()
    ]


def main() -> int:
    """Compile; ends with 1 if a call fails."""
    part, parts = map(int, sys.argv[1:])
    driver.install()
    failed = 0
    with driver.Redirect("meta"):
        for name, call in kernel_calls()[part::parts]:
            try:
                call()
            except Exception as error:
                failed += 1
                print(f"{name}: {type(error).__name__}: {error}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
