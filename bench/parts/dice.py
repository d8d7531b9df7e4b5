"""Whole training runs: how long until the phantom's liver is segmented to a given Dice.

Ours and Opacus train the same network from the same weights on the same Poisson batches with the
same noise multiplier (epsilon 8), the same optimizer and the same weight average; only the noise
drawn differs, as it must. They take turns, step by step, so that both see the same machine. Opacus
runs in the mode that is fastest on this network, found by timing a step of each. Evaluation is not
timed. A run that has not got there after the steps that the budget is for has no time.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

import numpy as np
import opacus
import torch
import typer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import dpkernels
from bench import models, table, work
from bench.part import How, Part, Row, Todo
from dpkernels.accounting import get_noise_multiplier
from dpkernels.training.ema import WeightAverage

OPACUS_MODES = ("hooks", "functorch")
_WINDOW = (-150.0, 200.0)
_CLASSES = 3
_DECAY = 0.9
Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Task:
    """What is trained, and when it is good enough.

    Attributes:
        patients: of the training set; `held_out` more for the Dice.
        side: of the volumes, voxels.
        batch_size: expected patients of a Poisson batch.
        steps: that the noise is calibrated for, and the most that are taken.
        every: steps between evaluations.
    """

    patients: int = 96
    held_out: int = 16
    side: int = 32
    batch_size: int = 16
    steps: int = 100
    every: int = 5
    dice: float = 0.70
    epsilon: float = 8.0
    delta: float = 1e-5
    max_grad_norm: float = 0.5
    learning_rate: float = 1e-2

    def noise_multiplier(self) -> float:
        """The least noise for the budget."""
        return get_noise_multiplier(
            target_epsilon=self.epsilon,
            target_delta=self.delta,
            sample_rate=self.batch_size / self.patients,
            steps=self.steps,
        )


@dataclass
class Runner:
    """One rival in training; times are those of its steps, seconds."""

    network: nn.Module
    step: Callable[[Batch], None]
    average: WeightAverage
    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    dice: float = 0.0
    reached: bool = False

    def take(self, batch: Batch) -> None:
        """One timed step; updating the average belongs to it."""
        wall, processor = time.perf_counter(), time.process_time()
        self.step(batch)
        self.average.update(self.network)
        self.processor.append(time.process_time() - processor)
        self.wall.append(time.perf_counter() - wall)


def todo(
    how: How, repetitions: Annotated[int, typer.Option(min=1, help="Runs of each.")] = 5
) -> Todo:
    """Repetitions, two rows each, which differ in weights, batches and noise."""
    return of_task(Task(), repetitions, how)


def of_task(task: Task, repetitions: int, how: How) -> Todo:
    """Repetitions of a task."""
    items = {f"repetition {index}": partial(_measure, index, task) for index in range(repetitions)}
    return Todo(items, how)


def race(task: Task, seed: int, report: work.Report = work.SILENT) -> dict[str, Runner]:
    """Train ours and Opacus to the Dice, by turns."""
    images, labels = phantom(task)
    train, test = slice(task.patients), slice(task.patients, None)
    torch.manual_seed(seed)
    network, sigma = _network(), task.noise_multiplier()
    mode = _fastest_mode(
        network, task, sigma, (images[: task.batch_size], labels[: task.batch_size])
    )
    runners = {
        "ours": _runner(dpkernels.PrivacyEngine(), network, task, sigma),
        f"Opacus {mode}": _runner(
            opacus.PrivacyEngine(accountant="rdp"), network, task, sigma, grad_sample_mode=mode
        ),
    }
    coins = np.random.default_rng([seed, task.patients])
    rate = task.batch_size / task.patients
    for count in range(1, task.steps + 1):
        drawn = torch.from_numpy(np.flatnonzero(coins.random(task.patients) < rate))
        batch = (images[train][drawn], labels[train][drawn])
        racing = [r for r in runners.values() if not r.reached]
        for runner in racing[:: 1 if count % 2 else -1]:
            runner.take(batch)
        if count % task.every == 0:
            for runner in racing:
                runner.dice = liver_dice(runner, images[test], labels[test])
                runner.reached = runner.dice >= task.dice
            shown = ", ".join(f"{name} {r.dice:.2f}" for name, r in runners.items())
            report(shown, count / task.steps)
        if all(r.reached for r in runners.values()):
            break
    return runners


def phantom(task: Task) -> Batch:
    """The synthetic cohort: images [N, 1, S, S, S] in [0, 1], labels [N, 1, S, S, S]."""
    from dpkernels.segmentation.phantom import make_phantom

    images, labels = [], []
    low, high = _WINDOW
    size = (task.side,) * 3
    for patient in range(task.patients + task.held_out):
        scan = make_phantom(patient)
        image = torch.from_numpy(scan.image)[None, None].float()
        image = ((image - low) / (high - low)).clamp_(0.0, 1.0)
        label = torch.from_numpy(scan.label)[None, None].float()
        images.append(F.interpolate(image, size=size, mode="trilinear", align_corners=False))
        labels.append(F.interpolate(label, size=size, mode="nearest-exact"))
    return torch.cat(images), torch.cat(labels)


@torch.no_grad()
def liver_dice(runner: Runner, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Mean Dice of the liver over scans, by the averaged weights."""
    from dpkernels.segmentation.evaluate import dice_score
    from dpkernels.segmentation.phantom import LIVER

    with runner.average.applied_to(runner.network):
        runner.network.eval()
        found = torch.cat([runner.network(image[None]) for image in images]).argmax(dim=1)
        runner.network.train()
    pairs = zip((found == LIVER).numpy(), (labels[:, 0] == LIVER).numpy(), strict=True)
    return statistics.fmean(dice_score(*pair) for pair in pairs)


def _network() -> nn.Module:
    shape = {"channels": (8, 16, 32), "strides": (2, 2), "num_res_units": 1, "bias": False}
    return models.of_monai("UNet", _CLASSES, **shape)


def _runner(engine: Any, initial: nn.Module, task: Task, sigma: float, **options: Any) -> Runner:
    from monai.losses import DiceCELoss

    network = copy.deepcopy(initial).train()
    criterion = DiceCELoss(softmax=True, to_onehot_y=True)
    data = TensorDataset(torch.arange(task.patients))
    module, optimizer, _ = engine.make_private(
        module=network,
        optimizer=torch.optim.NAdam(network.parameters(), lr=task.learning_rate),
        data_loader=DataLoader(data, batch_size=task.batch_size),
        noise_multiplier=sigma,
        max_grad_norm=task.max_grad_norm,
        poisson_sampling=False,
        **options,
    )

    def step(batch: Batch) -> None:
        optimizer.zero_grad(set_to_none=True)
        criterion(module(batch[0]), batch[1]).backward()
        optimizer.step()

    return Runner(network, step, WeightAverage(network, _DECAY))


def _fastest_mode(network: nn.Module, task: Task, sigma: float, batch: Batch) -> str:
    """By the second step of each: the first one imports."""

    def seconds(mode: str) -> float:
        engine = opacus.PrivacyEngine(accountant="rdp")
        runner = _runner(engine, network, task, sigma, grad_sample_mode=mode)
        runner.take(batch)
        runner.take(batch)
        return runner.processor[-1]

    return min(OPACUS_MODES, key=seconds)


def _measure(index: int, task: Task, report: work.Report) -> Iterator[list[Row]]:
    rows = []
    for name, runner in race(task, seed=index, report=report).items():
        rows.append(
            {
                "repetition": index,
                "rival": name.split(" ")[0],
                "mode": name.partition(" ")[2] or "fused",
                "reached": runner.reached,
                "dice": runner.dice,
                "steps": len(runner.wall),
                "seconds": sum(runner.wall) if runner.reached else None,
                "processor_seconds": sum(runner.processor) if runner.reached else None,
                "processor_ms_per_step": 1e3 * statistics.median(runner.processor),
                "target_dice": task.dice,
                "epsilon": task.epsilon,
                "delta": task.delta,
                "noise_multiplier": f"{task.noise_multiplier():.6g}",
                "planned_steps": task.steps,
                "batch": task.batch_size,
                "patients": task.patients,
                "side": task.side,
            }
        )
    yield rows


def digest(rows: list[dict[str, str]]) -> list[str]:
    """Seconds until the phantom's liver is segmented, ours against Opacus."""
    by_rival: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        by_rival.setdefault(row["rival"], []).append(row)
    first, parts = rows[0], []
    for rival, own in by_rival.items():
        reached = [row for row in own if row["reached"] == "True"]
        times = [float(row["processor_seconds"]) for row in reached]
        wall = [float(row["seconds"]) for row in reached]
        steps = [int(row["steps"]) for row in reached]
        each = statistics.median(float(row["processor_ms_per_step"]) for row in own)
        name = "dpkernels" if rival == "ours" else f"{rival} ({own[0]['mode']})"
        found = "never got there"
        if reached:
            found = (
                f"{statistics.median(wall):.1f} s, processor {statistics.median(times):.1f} s "
                f"({min(times):.1f} to {max(times):.1f}), {statistics.median(steps):.0f} steps of "
                f"{each:.0f} ms"
            )
        parts.append(f"{name} {found} ({len(reached)} of {len(own)} runs)")
    return [
        f"Whole training runs on the phantom ({first['side']}³, {first['patients']} patients) to a "
        f"Dice of {first['target_dice']} at epsilon {first['epsilon']}, medians: "
        + "; ".join(parts)
        + f". ({table.provenance(rows)})"
    ]


PART = Part(
    "time-to-dice",
    "Whole training runs to a Dice of 0.70 at epsilon 8, ours against Opacus.",
    ("device", "threads", "repetition", "rival"),
    todo,
    seconds=140.0,
    arguments=("--repetitions", "3"),
    digest=digest,
    headline=True,
)
