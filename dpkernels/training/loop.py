"""The training loop: steps, weight average, log, ledger and checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from dpkernels.training.config import TrainingConfig
from dpkernels.training.ema import WeightAverage
from dpkernels.training.logs import MetricsLog
from dpkernels.training.privacy import (
    LossOfRows,
    PlainUpdate,
    PrivacyPlan,
    PrivateUpdate,
    StepStatistics,
)
from dpkernels.training.processes import ALONE, TrainingProcesses
from dpkernels.training.progress import Display
from dpkernels.training.run_folder import RunFolder, StepLedger
from dpkernels.training.store import PatientDataset
from dpkernels.training.targets import build_optimizer

_SECONDS_BETWEEN_CHECKPOINTS = 30.0


class TrainingLoop:
    """Takes the planned steps, from the beginning or from a checkpoint.

    A step is entered in the ledger before its batch is drawn. After a kill the ledger may hold
    more steps than the checkpoint: those are counted as taken and not taken again, so the budget
    is never exceeded.

    Args:
        config: steps, optimizer, schedule, average.
        plan: privacy of the run.
        folder: where checkpoints and metrics go.
        network: in place; parameters that do not require a gradient stay as they are.
        dataset: the training patients.
        processes: those that take the steps together.
    """

    def __init__(
        self,
        config: TrainingConfig,
        plan: PrivacyPlan,
        folder: RunFolder,
        network: nn.Module,
        dataset: PatientDataset,
        processes: TrainingProcesses = ALONE,
    ) -> None:
        self._config = config
        self._plan = plan
        self._folder = folder
        self._network = network.train()
        self._dataset = dataset
        optimizer = build_optimizer(
            config.optimizer, [p for p in network.parameters() if p.requires_grad]
        )
        self._rate = optimizer.param_groups[0]["lr"]
        self._update = (PrivateUpdate if plan.enabled else PlainUpdate)(
            network, optimizer, dataset, plan, config.physical_batch_size, processes
        )
        self.average = WeightAverage(network, config.ema_decay)
        self._steps = 0

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint of `run`."""
        self._network.load_state_dict(state["model"])
        self._update.load_state_dict(state["update"])
        self.average.load_state_dict(state["average"])

    def run(
        self,
        loss_of_rows: LossOfRows,
        validate: Callable[[], float | None],
        display: Display,
    ) -> int:
        """Take the steps that are left.

        Args:
            loss_of_rows: the loss of a block of rows, (model, image, label).
            validate: the validation score, called every `validate_every` steps.
            display: where progress goes.

        Returns:
            The steps in the accountant's history.

        Raises:
            FloatingPointError: the loss is not finite.
            OSError: a checkpoint cannot be written; the previous one is whole.
        """
        ledger = StepLedger(self._folder.ledger)
        self._update.count_lost_steps(ledger.count - self._update.steps_counted)
        self._steps = ledger.count
        log = MetricsLog(self._folder.metrics_csv, self._folder.root / "tensorboard")
        saved = time.monotonic()
        try:
            with display.training(self._plan, done=ledger.count) as bar:
                while ledger.count < self._plan.steps:
                    began = time.monotonic()
                    self._steps = ledger.begin()
                    statistics = self._step(loss_of_rows)
                    row = {
                        "step": self._steps,
                        **asdict(statistics),
                        "learning_rate": self._update.optimizer.param_groups[0]["lr"],
                        "seconds": round(time.monotonic() - began, 4),
                        "epsilon": bar.advance(statistics),
                    }
                    every = self._config.validate_every
                    if every and self._steps % every == 0:
                        row["validation"] = validate()
                    log.write(row)
                    if self._checkpoint_due(time.monotonic() - saved):
                        self._save()
                        saved = time.monotonic()
        except KeyboardInterrupt:
            self._save()
            raise
        finally:
            log.close()
            ledger.close()
        self._save()
        if self.average.enabled:
            self._folder.save_checkpoint("ema.pt", {"model": self.average.weights(self._network)})
        return self._update.steps_counted

    def _step(self, loss_of_rows: LossOfRows) -> StepStatistics:
        self._dataset.step = self._steps
        rate = self._rate * _schedule(self._config.schedule, self._steps - 1, self._plan.steps)
        for group in self._update.optimizer.param_groups:
            group["lr"] = rate
        statistics = self._update.step(loss_of_rows)
        if statistics.loss is not None and not math.isfinite(statistics.loss):
            raise FloatingPointError(
                f"the loss is {statistics.loss} at step {self._steps}; lower the learning rate, or "
                "look for extreme intensities in the images"
            )
        self.average.update(self._network)
        return statistics

    def _checkpoint_due(self, elapsed: float) -> bool:
        every = self._config.checkpoint_every
        return self._steps % every == 0 if every else elapsed > _SECONDS_BETWEEN_CHECKPOINTS

    def _save(self) -> None:
        state = {
            "model": self._network.state_dict(),
            "update": self._update.state_dict(),
            "average": self.average.state_dict(),
            "step": self._steps,
            "plan": self._plan.to_dict(),
        }
        self._folder.save_checkpoint("last.pt", state)


def rows_loss(criterion: nn.Module, device: torch.device, precision: str) -> LossOfRows:
    """The loss of a block of rows on a device, under autocast when `precision` is bfloat16."""

    def loss_of_rows(model: nn.Module, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            output = model(image.to(device))
        return criterion(output, label.to(device))

    return loss_of_rows


def _schedule(name: str, step: int, steps: int) -> float:
    return {"constant": 1.0, "cosine": 0.5 * (1 + math.cos(math.pi * step / steps))}[name]
