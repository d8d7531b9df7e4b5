"""An LSTM on the CPU: products by the library, what lies between them in one C++ pass a step."""

from __future__ import annotations

import functools

import torch

from dpkernels.ops import native
from dpkernels.ops.recurrence import library
from dpkernels.ops.recurrence.records import Gradients, RecurrentWeights, Saved
from dpkernels.ops.recurrence.steps import Steps, running

unavailable = native.why_not_cpu


def why_not(first: torch.Tensor | Gradients, *rest: object) -> str | None:
    """Why csrc/cpu/recurrence.cpp cannot take these arguments, of one dtype all."""
    dtype = (first if isinstance(first, torch.Tensor) else first.grad_output).dtype
    return None if dtype == torch.float32 else f"it takes float32, and these are {dtype}"


def _compiled_step(of_steps: tuple[torch.Tensor, ...], steps: Steps) -> library.Step:
    """As the library's, in one pass over memory."""
    gates, cell = of_steps[:2]
    at_gates, *results = (t.data_ptr() for t in of_steps)
    kernel, launch = native.extension(gates).lstm_step, native.launch_on(gates)
    sizes, firsts, width = steps.sizes, steps.firsts(), cell.shape[1]

    def step(t: int, c: torch.Tensor) -> None:
        kernel(at_gates, c.data_ptr(), *results, firsts[t], sizes[t], width, launch)

    return step


lstm = functools.partial(library.lstm, step_by=_compiled_step)


def lstm_backward(
    grads: Gradients, saved: Saved, weights: RecurrentWeights, steps: Steps
) -> list[torch.Tensor]:
    """See the contract."""
    kept = [t.contiguous() for t in saved]
    gates, projection = kept[0], weights.weight_hr
    dh, dc = (t.clone(memory_format=torch.contiguous_format) for t in grads[1:])
    grad_gates = torch.empty_like(gates)
    results, inputs = ([t.data_ptr() for t in each] for each in ((grad_gates, dc), kept))
    at_sums, outer = map(steps.split, (grad_gates, grads.grad_output))
    projected = [] if projection is None else [torch.empty_like(grads.grad_output)]
    projections = [steps.split(each) for each in projected]
    kernel, launch = native.extension(gates).lstm_step_backward, native.launch_on(gates)
    sizes, firsts = steps.sizes, steps.firsts()
    for t in reversed(list(steps.order())):
        now = hidden = running(dh, sizes[t]).add_(outer[t])
        if projection is not None:
            hidden = projections[0][t].copy_(now) @ projection
        kernel(*results, hidden.data_ptr(), *inputs, firsts[t], sizes[t], dc.shape[1], launch)
        torch.mm(at_sums[t], weights.weight_hh, out=now)
    return [grad_gates, dh, dc, *projected]
