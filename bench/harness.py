"""From a case to its rows: gate, interleaved times, memory."""

from __future__ import annotations

import gc
import os
from dataclasses import asdict, dataclass, replace

import torch

from bench import gate, memory, timing
from bench.cases import Case, Workload
from bench.results import Environment, Row
from bench.rivals import Privacy, Rival, Trainer
from bench.work import Report

_NOISE_MULTIPLIER = 1.0


@dataclass(frozen=True)
class Plan:
    """How long and how often to measure.

    Attributes:
        seconds: per case, for the timed rounds.
        least: rounds of every rival that is not far slower than the ordinary step.
        most: rounds.
        memory: whether peak memory is measured too.
        allocator: stated in the rows.
        everyone: measure also the rivals that a case leaves out to save minutes.
    """

    seconds: float = 30.0
    least: int = 3
    most: int = 60
    memory: bool = True
    allocator: str = "system"
    everyone: bool = False


def measure(
    case: Case, rivals: list[Rival], device: torch.device, plan: Plan, report: Report
) -> list[Row]:
    """Rows of every rival on a case; a rival that fails or cannot run has its reason as status.

    Args:
        report: called with what is being done and the share of the case that is done.

    Raises:
        RuntimeError: the ordinary step cannot run, or an error has ended the use of the GPU.
    """
    left_out = () if plan.everyone else case.leave_out
    rivals = [rival for rival in rivals if rival.name not in left_out]
    environment = Environment.here(device, plan.allocator)
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    workload = case.build(device)
    report("per-sample truth", 0.0)
    truths = gate.truths(workload)
    bound = truths[-1][1].max_grad_norm
    rows: dict[str, Row] = {}
    ready: dict[str, Trainer] = {}
    for index, rival in enumerate(rivals):
        report(f"gate: {rival.title}", 0.05 + 0.2 * index / len(rivals))
        row, trainer = _admit(rival, truths)
        rows[rival.name] = replace(row, load=load, **asdict(environment))
        if trainer is not None:
            ready[rival.name] = trainer
        _collect(device)
    if "ordinary" not in ready:
        raise RuntimeError(f"the ordinary step {rows['ordinary'].status}")
    rows |= _timed(rows, ready, timing.clock_for(device), plan, report)
    if plan.memory:
        private = Privacy(bound, _NOISE_MULTIPLIER)
        admitted = [rival for rival in rivals if rival.name in ready]
        if device.type == "cuda":
            grown = {r.name: memory.on_gpu(ready[r.name], device) for r in admitted}
        else:
            ready.clear()
            _collect(device)
            grown = _grown_on_cpu(case, admitted, private, report)
        rows |= _with_memory(rows, grown)
    return [rows[rival.name] for rival in rivals]


def _admit(rival: Rival, truths: list[tuple[Workload, gate.Truth]]) -> tuple[Row, Trainer | None]:
    """The row without figures, and the trainer to be timed if the gate lets it through."""
    workload = truths[-1][0]
    row = Row(
        case=workload.case.name,
        rival=rival.name,
        status="ok",
        batch=workload.batch_size,
        parameters=workload.parameters(),
        precision=workload.case.precision,
        config=rival.config,
        version=rival.version(),
    )
    errors = []
    for work, truth in truths:
        privacy = Privacy(truth.max_grad_norm, 0.0)
        try:
            trainer = rival.prepare(work, privacy)
            gradients = gate.released(trainer)
        except Exception as error:
            timing.require_working(work.inputs.device, f"{row.case}, {rival.name}: {error}")
            return replace(row, status=f"cannot run: {one_line(error)}"), None
        if rival.private:
            errors.append(truth.error(gradients))
            row = replace(row, gate_error=errors[0])
            allowed = truth.allowed + min(trainer.margin(), gate.LARGEST_MARGIN)
            if not errors[-1] <= allowed:
                reason = f"wrong gradient: error {errors[-1]:.2g}, allowed {allowed:.2g}"
                return replace(row, status=reason), None
    privacy.noise_multiplier = _NOISE_MULTIPLIER
    return row, trainer


def _timed(
    rows: dict[str, Row],
    ready: dict[str, Trainer],
    clock: timing.Clock,
    plan: Plan,
    report: Report,
) -> dict[str, Row]:
    """The rows of the admitted rivals with their times."""
    report("warm-up", 0.25)
    rounds = timing.interleave(
        ready,
        clock,
        seconds=plan.seconds,
        least=plan.least,
        most=plan.most,
    )
    samples = next(rounds)
    for count, _ in enumerate(rounds, start=1):
        report(f"round {count}", 0.3 + 0.5 * count / plan.most)
    base = samples["ordinary"]
    timed = {}
    for name, own in samples.items():
        wall = timing.Spread.of([1e3 * t for t in own.wall.values()])
        ratio = timing.ratios(own.wall, base.wall)
        row = replace(
            rows[name],
            ms=wall.median,
            ms_p20=wall.p20,
            ms_p80=wall.p80,
            ratio=ratio.median,
            ratio_p20=ratio.p20,
            ratio_p80=ratio.p80,
            rounds=len(own.wall),
        )
        if own.processor:
            ratio = timing.ratios(own.processor, base.processor)
            row = replace(
                row,
                processor_ms=1e3 * timing.Spread.of(list(own.processor.values())).median,
                processor_ratio=ratio.median,
                processor_p20=ratio.p20,
                processor_p80=ratio.p80,
            )
        timed[name] = row
    return timed


def _grown_on_cpu(
    case: Case, admitted: list[Rival], privacy: Privacy, report: Report
) -> dict[str, float | None]:
    grown = {}
    for index, rival in enumerate(admitted):
        report(f"memory: {rival.title}", 0.8 + 0.2 * index / len(admitted))
        grown[rival.name] = memory.on_cpu(case, rival, privacy, torch.get_num_threads())
    return grown


def _with_memory(rows: dict[str, Row], grown: dict[str, float | None]) -> dict[str, Row]:
    base = grown.get("ordinary")
    return {
        name: replace(rows[name], memory_mb=own, memory_ratio=own / base if own and base else None)
        for name, own in grown.items()
    }


def _collect(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def one_line(error: Exception) -> str:
    """What an error says, for a row."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."
