"""What the engine's trial for mixed samples costs, in ordinary steps and in memory.

Each round has new engines on copies of the model, one with the default trial and one without, and
ordinary steps between them. What both engines do, as planning, is in neither difference.
"""

from __future__ import annotations

import gc
import math
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from bench import cases, harness, memory, models, rivals, table, timing, work
from bench.part import How, Only, Part, Row, Todo
from bench.rivals import Privacy, Rival, Trainer
from bench.table import number

PLAN = harness.Plan(seconds=8.0, least=3, most=15)
#: what may be spent: ordinary steps at the first batch, per cent of a training run, memory
FIRST, RUN, MEMORY = 8.0, 3.0, 1.05
#: steps of that training run
STEPS = 1000
#: the step whose trial stands for the later ones; a round's engines take as many steps
_LATER = 2
#: ordinary steps of a round, one right after the other as in training, and the seconds after which
#: none is begun
_ROW, _ROW_SECONDS = 20, 0.5
#: processes whose median is the memory of a case
_PROCESSES = 3
#: the trials that are compared
DEFAULT, OFF = "doubling", "off"
_ORDINARY = "ordinary"
_PRIVACY = Privacy(1.0, 1.0)


def _perceptron(batch: int) -> cases.Case:
    return cases.Case(
        f"perceptron-b{batch}",
        f"MLP, 128-256-256-10, B={batch:,}",
        "",
        partial(models.perceptron, 128, 256, 256, 10),
        partial(cases.labelled, (128,), 10, batch),
    )


#: one network at batch sizes far apart: the cost in ordinary steps must not grow with them
BATCHES = tuple(_perceptron(batch) for batch in (64, 1024, 32_768))
_GPT2 = cases.Case(
    "gpt2-t64-d256-b8",
    "GPT-2 of 4 blocks, T=64, d=256, vocabulary 8000, B=8",
    "",
    partial(models.GPT2, 8000, 64, 256, 4, 4),
    partial(cases.tokens, 8000, 64, 8),
)
#: of `steps`, one network of each kind: others of the kind cost alike, and some take minutes
OF_STEPS = (
    "unet3d-48-b2",
    "monai-unet-64-b4",
    "encoder-t128-d256-b8",
    "vit-32-b32",
    "resnet-small-32-b64",
    "resnet50-32-b8",
    "lstm-t64-d128-b32",
    "recommender-b512",
)
CASES = {
    case.name: case
    for case in (
        *(case for case in cases.find([], "cpu") if case.name in OF_STEPS),
        cases.encoder(64, 64, 2, 8),
        _GPT2,
        *BATCHES,
    )
}


@dataclass
class Seconds:
    """Processor time of steps, of every round.

    Attributes:
        ordinary: of single steps.
        private: by trial, the steps of a new engine, the first one first.
    """

    ordinary: list[float] = field(default_factory=list)
    private: dict[str, list[list[float]]] = field(default_factory=lambda: {DEFAULT: [], OFF: []})

    def figures(self) -> dict[str, object]:
        """Columns `ordinary_ms`, and in ordinary steps `first` and `later`, with percentiles."""
        ordinary = statistics.median(self.ordinary)
        found: dict[str, object] = {"ordinary_ms": 1e3 * ordinary}
        for name, step in (("first", 1), ("later", _LATER)):
            extra = [
                (with_trial[step - 1] - without[step - 1]) / ordinary
                for with_trial, without in zip(
                    self.private[DEFAULT], self.private[OFF], strict=True
                )
            ]
            found |= timing.spread(extra, name, f"{name}_p20", f"{name}_p80")
        return found


def todo(how: How, case: Only = None) -> Todo:
    """The cases of these names, or all: those of `steps` on a CPU, and some of this part's own."""
    table.require_known("case", case or (), CASES)
    chosen = case or list(CASES)
    return of_cases([CASES[name] for name in chosen], how)


def of_cases(wanted: Sequence[cases.Case], how: How, plan: harness.Plan = PLAN) -> Todo:
    """One row for each case, and what prints the rows."""

    def show() -> None:
        rows = table.read(how.output)
        if rows:
            work.say_table(HEADS, lines(rows), "what the trial for mixed samples costs")
            work.say(*digest(rows))

    items = {case.name: partial(_measure, case, how, plan) for case in wanted}
    return Todo(items, how, show=show)


def private(workload: cases.Workload, privacy: Privacy, trial: str) -> Trainer:
    """Our step by a new engine, with ``trial="doubling"`` (its default) or ``"off"``."""
    return rivals.ours(workload, privacy, trial=trial)


def trials(steps: int) -> int:
    """How many trials a training run has by default: at steps 1, 2, 4, 8, ..."""
    return steps.bit_length()


def run_percent(first: float, later: float, steps: int = STEPS) -> float:
    """What the trials of a training run cost, in per cent of its ordinary steps.

    Args:
        first, later: what one trial costs, in ordinary steps.
    """
    return 100.0 * (first + (trials(steps) - 1) * later) / steps


def times(workload: cases.Workload, plan: harness.Plan, report: work.Report) -> Seconds:
    """Time rounds of two new engines and a row of ordinary steps, in rotating order."""
    ordinary = rivals.find([_ORDINARY])[0].prepare(workload, _PRIVACY)
    prepare = {
        _ORDINARY: lambda: ordinary,
        **{trial: partial(private, workload, _PRIVACY, trial) for trial in (DEFAULT, OFF)},
    }
    for trainer in prepare.values():
        trainer()()
    found, names = Seconds(), list(prepare)
    gc.collect()
    gc.freeze()  # what lives by now is not searched again: a collection takes no time of a round
    began = time.monotonic()
    for index in range(plan.most):
        if index >= plan.least and time.monotonic() - began > plan.seconds:
            break
        report(f"round {index + 1}", 0.7 * index / plan.most)
        first = index % len(names)
        for name in names[first:] + names[:first]:
            gc.collect()
            step = prepare[name]()
            if name == _ORDINARY:
                found.ordinary += _steps(step, _ROW, _ROW_SECONDS)
            else:
                found.private[name].append(_steps(step, _LATER))
    gc.unfreeze()
    return found


def _steps(step: timing.Step, most: int, seconds: float = math.inf) -> list[float]:
    """Processor time of steps one after the other, as many as begin within these seconds."""
    began, taken = time.monotonic(), [_processor_seconds(step)]
    while len(taken) < most and time.monotonic() - began < seconds:
        taken.append(_processor_seconds(step))
    return taken


def _processor_seconds(step: timing.Step) -> float:
    began = time.process_time()
    step()
    return time.process_time() - began


def _measure(
    case: cases.Case, how: How, plan: harness.Plan, report: work.Report
) -> Iterator[list[Row]]:
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    workload = case.build(timing.CPU)
    seconds = times(workload, plan, report)
    figures = seconds.figures()
    row: dict[str, object] = {
        "case": case.name,
        "batch": workload.batch_size,
        "parameters": workload.parameters(),
        **figures,
        "trials": trials(STEPS),
        "run_1000": run_percent(float(str(figures["first"])), float(str(figures["later"]))),
        "rounds": len(seconds.private[OFF]),
        "load": load,
    }
    report("memory", 0.7)
    yield [row | _memory(case, how.threads, _PROCESSES if plan.memory else 0)]


def _memory(case: cases.Case, threads: int, processes: int) -> dict[str, float | None]:
    """Columns `memory_mb`, `memory_off_mb`, `memory`: of the first step, and their ratio."""
    with_trial, without = (_grown(case, trial, threads, processes) for trial in (DEFAULT, OFF))
    ratio = with_trial / without if with_trial and without else None
    return {"memory_mb": with_trial, "memory_off_mb": without, "memory": ratio}


def _grown(case: cases.Case, trial: str, threads: int, processes: int) -> float | None:
    """Peak growth of the first step, MB, in so many processes; None where one has not told it."""
    name = f"ours, trial {trial}"
    rival = Rival(name, name, "", "dpkernels", partial(private, trial=trial))
    found = [memory.on_cpu(case, rival, _PRIVACY, threads, steps=1) for _ in range(processes)]
    told = [grown for grown in found if grown is not None]
    return statistics.median(told) if told and len(told) == processes else None


HEADS = (
    "case",
    "B",
    "ordinary step",
    f"first batch, ordinary steps (goal: at most {FIRST:g})",
    "a later trial, ordinary steps",
    f"{STEPS:,} steps, {trials(STEPS)} trials (goal: at most {RUN:g}%)",
    f"memory of the first step (goal: at most {MEMORY:g})",
)


def lines(rows: Sequence[Mapping[str, str]], strong: str = "") -> list[tuple[str, ...]]:
    """The cells under :data:`HEADS`, case by case; what is above its goal ends with ``*``.

    Args:
        strong: put before and after the figures above their goals, in the place of ``*``.
    """
    found = []
    for row in rows:
        judged = []
        for column, goal, form in (
            ("first", FIRST, "{:.1f}"),
            ("run_1000", RUN, "{:.2f}%"),
            ("memory", MEMORY, "{:.3f}"),
        ):
            value = number(row[column])
            text = "–" if value is None else form.format(value)
            if value is not None and value > goal:
                text = f"{strong}{text}{strong}" if strong else f"{text}*"
            judged.append(text)
        first, run, grown = judged
        title = CASES[row["case"]].title if row["case"] in CASES else row["case"]
        ordinary, later = f"{float(row['ordinary_ms']):.3g} ms", f"{float(row['later']):.1f}"
        found.append((title, f"{int(row['batch']):,}", ordinary, first, later, run, grown))
    return found


def digest(rows: list[dict[str, str]]) -> list[str]:
    """What the trial costs in the median and in the worst case, and by batch size."""
    parts = []
    for column, goal, what, unit in (
        ("first", FIRST, "ordinary steps at the first batch", ""),
        ("run_1000", RUN, f"of {STEPS:,} ordinary steps by {trials(STEPS)} trials", "%"),
        ("memory", MEMORY, "times the memory of a first step without", ""),
    ):
        values = {row["case"]: number(row[column]) for row in rows}
        told = {case: value for case, value in values.items() if value is not None}
        if told:
            worst = max(told, key=told.__getitem__)
            met = sum(value <= goal for value in told.values())
            parts.append(
                f"{statistics.median(told.values()):.3g}{unit} {what} in the median case, at most "
                f"{told[worst]:.3g}{unit} ({worst}; goal {goal:g}{unit}, met in {met} of "
                f"{len(told)})"
            )
    found = [f"The trial for mixed samples: {'; '.join(parts)}. ({table.provenance(rows)})"]
    by_case = {row["case"]: row for row in rows}
    if len(own := [by_case[case.name] for case in BATCHES if case.name in by_case]) > 1:
        listed = ", ".join(f"{float(r['first']):.1f} at B={int(r['batch']):,}" for r in own)
        found.append(f"The first trial by batch size, an MLP, in ordinary steps: {listed}.")
    return found


def tables(rows: list[dict[str, str]]) -> list[str]:
    """What the trial costs, case by case, beside the goals."""
    head = (
        "What the trial for mixed samples costs, by the processor time of one thread, in steps of "
        "the same network and batch without privacy; a trial runs at steps 1, 2, 4, 8, and so on. "
        f"In bold: above the goal. ({table.provenance(rows)})"
    )
    return [head, table.markdown(HEADS, lines(rows, strong="**"), figures=len(HEADS) - 1)]


PART = Part(
    "trial",
    "What the trial for mixed samples costs: time of the first and of later steps, memory.",
    ("device", "threads", "case"),
    todo,
    digest=digest,
    tables=tables,
)
