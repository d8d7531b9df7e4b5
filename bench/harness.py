"""From a case to its rows: gate, interleaved times, memory."""

from __future__ import annotations

import gc
import math
import os
import statistics
import time
from dataclasses import dataclass, replace

import torch

from bench import gate, memory, profiling, timing
from bench.cases import Case, Workload
from bench.results import Row
from bench.rivals import RIVALS, Privacy, Rival, Trainer
from bench.work import Report

_NOISE_MULTIPLIER = 1.0
_PROFILED_STEPS = 5


@dataclass(frozen=True)
class Plan:
    """How long and how often to measure.

    Attributes:
        seconds: per case, for the timed rounds.
        case_seconds: after these no further rival of a case is begun, but for the ordinary step
            and ours.
        least: rounds of every rival that is not far slower than the ordinary step.
        most: rounds.
        memory: whether peak memory is measured too.
        everyone: measure also the rivals that a case leaves out to save minutes.
    """

    seconds: float = 30.0
    case_seconds: float | None = None
    least: int = 3
    most: int = 60
    memory: bool = True
    everyone: bool = False


def measure(
    case: Case, rivals: list[Rival], device: torch.device, plan: Plan, report: Report
) -> list[Row]:
    """Rows of every rival on a case; a rival that fails or cannot run has its reason as status.

    Args:
        report: called with what is being done and the share of the case that is done; told of each
            rival before anything of it runs. A rival that it names as ended is not run.

    Raises:
        RuntimeError: the ordinary step cannot run.
        GpuLost: an error has ended the use of the GPU by this process.
    """
    began = time.monotonic()
    left_out = () if plan.everyone else case.leave_out
    rivals = [rival for rival in rivals if rival.name not in left_out]
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    workload = case.build(device)
    report("per-sample truth", 0.0)
    truths = gate.truths(workload)
    bound = truths[-1][1].max_grad_norm
    rows: dict[str, Row] = {}
    ready: dict[str, Trainer] = {}

    def too_late(rival: Rival) -> bool:
        """Whether the seconds of the case are over, for all but those that it is about."""
        taken = time.monotonic() - began
        return rival.name not in timing.KEPT and taken > (plan.case_seconds or math.inf)

    for index, rival in enumerate(rivals):
        report(f"gate: {rival.title}", 0.05 + 0.2 * index / len(rivals))
        row, trainer = _row(rival, workload), None
        if rival.name in report.ended:
            row = replace(row, status=report.ended[rival.name])
        elif not too_late(rival):
            report.begin(rival.name)
            row, trainer = _admit(row, rival, truths)
        if row.status == "ok" and too_late(rival):
            status = f"not timed: the {plan.case_seconds:.0f} s for this case were over"
            row, trainer = replace(row, status=status), None
        rows[rival.name] = replace(row, load=load)
        if trainer is not None:
            ready[rival.name] = trainer
        _collect(device)
    if "ordinary" not in ready:
        raise RuntimeError(f"the ordinary step {rows['ordinary'].status}")
    rows |= _timed(rows, ready, device, plan, report)
    if plan.memory:
        private = Privacy(bound, _NOISE_MULTIPLIER)
        admitted = [rival for rival in rivals if rows[rival.name].status == "ok"]
        rows |= _with_memory(rows, ready, case, admitted, private, device, report)
    return [rows[rival.name] for rival in rivals]


def unmeasured(case: Case, rivals: list[Rival], status: str) -> list[Row]:
    """Rows of a case of which nothing could be run, with the reason as their status."""
    meta = torch.device("meta")
    with meta:
        workload = case.build(meta)
    return [replace(_row(rival, workload), status=status) for rival in rivals]


def profiled(rows: list[Row], case: Case, device: torch.device, report: Report) -> list[Row]:
    """The rows of ours and of the ordinary step with the share of their time the GPU is busy."""
    found, workload = [], case.build(device)
    for row in rows:
        if row.rival in timing.KEPT and row.ms:
            report(f"profile: {row.rival}", 0.5)
            report.begin(row.rival)
            rival = next(r for r in RIVALS if r.name == row.rival)
            step = rival.prepare(workload, Privacy(1.0, _NOISE_MULTIPLIER))
            seen = profiling.record(step, _PROFILED_STEPS, device)
            found.append(replace(row, busy=1e3 * seen.busy / row.ms if seen.events else None))
    return found


def _row(rival: Rival, workload: Workload) -> Row:
    """A row without figures."""
    return Row(
        case=workload.case.name,
        rival=rival.name,
        status="ok",
        batch=workload.batch_size,
        parameters=workload.parameters(),
        precision=workload.case.precision,
        config=rival.config,
        version=rival.version(),
    )


def _admit(
    row: Row, rival: Rival, truths: list[tuple[Workload, gate.Truth]]
) -> tuple[Row, Trainer | None]:
    """The row with its gate, and the trainer to be timed if the gate lets it through."""
    errors = []
    for work, truth in truths:
        privacy = Privacy(truth.max_grad_norm, 0.0)
        try:
            trainer = rival.prepare(work, privacy)
            gradients = gate.released(trainer)
            if rival.private:
                errors.append(truth.error(gradients))
        except Exception as error:
            status = timing.refusal(error, work.inputs.device, f"{row.case}, {rival.name}")
            return replace(row, status=status), None
        if rival.private:
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
    device: torch.device,
    plan: Plan,
    report: Report,
) -> dict[str, Row]:
    """The rows of the admitted rivals with their times, or with the error of a step."""
    report("warm-up", 0.25)
    rounds = timing.interleave(
        ready,
        timing.clock_for(device),
        seconds=plan.seconds,
        least=plan.least,
        most=plan.most,
        device=device,
        begin=report.begin,
    )
    samples = next(rounds)
    for count, _ in enumerate(rounds, start=1):
        report(f"round {count}", 0.3 + 0.5 * count / plan.most)
    base = samples["ordinary"]
    timed = {}
    for name, own in samples.items():
        if own.error is not None:
            status = timing.refusal(own.error, device, name)
            timed[name] = replace(rows[name], status=status)
            continue
        ratios = timing.ratios(own.wall, base.wall)
        figures = timing.spread([1e3 * t for t in own.wall.values()], "ms", "ms_p20", "ms_p80")
        figures |= timing.spread(ratios, "ratio", "ratio_p20", "ratio_p80")
        if own.processor:
            ratios = timing.ratios(own.processor, base.processor)
            names = ("processor_ratio", "processor_p20", "processor_p80")
            figures |= timing.spread(ratios, *names)
            figures["processor_ms"] = 1e3 * statistics.median(own.processor.values())
        if own.host:
            figures["host_ms"] = 1e3 * statistics.median(own.host.values())
        timed[name] = replace(rows[name], rounds=len(own.wall), **figures)
    return timed


def _with_memory(
    rows: dict[str, Row],
    ready: dict[str, Trainer],
    case: Case,
    admitted: list[Rival],
    privacy: Privacy,
    device: torch.device,
    report: Report,
) -> dict[str, Row]:
    """The rows of the admitted rivals with their memory; on the CPU `ready` is emptied first."""
    on_gpu, grown = device.type == "cuda", {}
    if not on_gpu:
        ready.clear()
        _collect(device)
    for index, rival in enumerate(admitted):
        report(f"memory: {rival.title}", 0.8 + 0.2 * index / len(admitted))
        report.begin(rival.name)
        try:
            if on_gpu:
                grown[rival.name] = memory.on_gpu(ready[rival.name], device)
            else:
                grown[rival.name] = memory.on_cpu(case, rival, privacy, torch.get_num_threads())
        except RuntimeError as error:
            timing.require_working(device, f"memory, {rival.name}: {error}")
            grown[rival.name] = None
    base = grown.get("ordinary")
    return {
        name: replace(rows[name], memory_mb=own, memory_ratio=own / base if own and base else None)
        for name, own in grown.items()
    }


def _collect(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
