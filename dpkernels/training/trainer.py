"""The course of a run, the same for every task: check, train, evaluate, report; and resume."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn
from typing_extensions import Self

from dpkernels.training.curves import draw_progress
from dpkernels.training.logs import read_metrics
from dpkernels.training.loop import TrainingLoop, rows_loss
from dpkernels.training.privacy import PrivacyPlan, check_patients_do_not_mix, plan_privacy
from dpkernels.training.processes import ALONE, TrainingProcesses
from dpkernels.training.progress import Display
from dpkernels.training.report import PrivacyReport, build_report
from dpkernels.training.run_folder import RunFolder, environment, load_checkpoint, steps_begun
from dpkernels.training.settings import load_yaml
from dpkernels.training.targets import load_weights, resolve_device, select_trainable
from dpkernels.training.trainer_base import Config, Result, Store, Summary, TrainerBase


@dataclass(frozen=True)
class TrainingResult:
    """What a finished run came to.

    Attributes:
        folder: the run folder.
        summary: per class (or for all images): name of a metric to its value.
        utility: the one number that a run is judged by, on held-out patients: `metric`.
        metric: its name.
        epsilon: spent, at the configured delta; None without privacy.
        steps: steps counted.
    """

    folder: Path
    summary: Summary
    utility: float
    metric: str
    epsilon: float | None
    steps: int


@dataclass(frozen=True)
class Exposed:
    """What an attack on a run needs to know of it.

    Attributes:
        images: [n, ...], float32: one view of each of the first training patients.
        labels: [n, ...], theirs.
        network: with the run's weights.
        criterion: called as criterion(network(images), labels); a mean over rows.
    """

    images: torch.Tensor
    labels: torch.Tensor
    network: nn.Module
    criterion: nn.Module


class Trainer(TrainerBase[Config, Store, Result]):
    """Train, resume, evaluate and report. A task says what its data, network and metric are.

    Args:
        config: what to run.
        out: run folder; default runs/<preset>-<date>-<time>.
        display: where progress goes; silent by default.

    Guarantees:
        With `privacy.enabled`, the weights after `fit` are differentially private for adding or
        removing one patient with everything recorded of them, at the epsilon of
        `privacy_report`. Losses, norms, pictures and metrics are by-products outside that
        guarantee; the report lists them.
    """

    def __init__(
        self, config: Config, out: str | Path | None = None, display: Display | None = None
    ) -> None:
        self.config = config
        self.folder = RunFolder(
            out or f"runs/{config.preset or 'run'}-{datetime.now():%Y%m%d-%H%M%S}"
        )
        self.display = display or Display()
        self.device = resolve_device(config.training.device)
        self._split = {}
        self._processes = ALONE

    @classmethod
    def from_run(cls, out: str | Path, display: Display | None = None) -> Self:
        """The trainer of an existing run, configured by its config.yaml.

        Raises:
            ValueError: `out` is not a run folder.
        """
        folder = RunFolder.open(out)
        config = cls.config_class.from_dict(load_yaml(folder.config))
        return cls(config, out, display)  # type: ignore[arg-type]

    def fit(self, *, resume: bool = False) -> TrainingResult:
        """Train, evaluate and write the run folder.

        Under ``torchrun`` the processes train together: each samples its share of the patients,
        the first writes, and every one returns its result.

        Args:
            resume: continue the run in the folder; otherwise the folder must hold none.

        Raises:
            ValueError: a faulty configuration or data set (before training starts), a folder that
                holds a run, or a resume with other privacy parameters or nothing left to do.
            OSError: the run folder cannot be written; the last checkpoint stays whole.
        """
        self._processes = TrainingProcesses.join()
        self.device = self._processes.own_device(self.device)
        if not self._processes.first:
            self.display = Display()
        open_folder = RunFolder.open if resume else RunFolder.create
        with self._processes.own_folder(self.folder, resume) as own:
            self.folder = open_folder(own.root)
            self.folder.check_writable()
            with self.folder.claimed():
                result = self._fit(resume)
        return self._processes.from_first(result)

    def _fit(self, resume: bool) -> TrainingResult | None:
        """What `fit` does in the folder; the result in the first process only."""
        store = self._store()
        network = self._build_network(self.config.training.seed).to(self.device)
        criterion = self._build_criterion()
        if start := self.config.training.init_from:
            load_weights(network, start)
        select_trainable(network, self.config.training.train_layers)
        plan = self.planned()
        checkpoint = self._resumed(plan) if resume else None
        records = store.folder.records
        with self.display.counting(f"Reading and checking {store.record}s", len(records)) as read:
            store.read_all(read)
        if not resume:
            self.folder.write_yaml("config.yaml", self.config.to_dict())
            self.folder.write_json("env.json", environment(self.device))
            self.folder.write_json("split.json", self._split)
            self.folder.write_json("plan.json", plan.to_dict())
            self.folder.write_json("data.json", self._description())
        steps = self._train(network, criterion, plan, checkpoint)
        if not self._processes.first:
            return None
        summary = self._summary(self.evaluate())
        report = self._report(plan, steps)
        self.save_report(report)
        return self._result(summary, report)

    def privacy_report(self) -> PrivacyReport:
        """The report of the run, for the steps counted so far.

        Raises:
            ValueError: no step was taken yet.
        """
        return self._report(self.plan(), steps_begun(self.folder.ledger))

    def save_report(self, report: PrivacyReport) -> None:
        """Write privacy_report.json and privacy_report.md to the run folder.

        Raises:
            OSError: it cannot be written.
        """
        self.folder.write_json("privacy_report.json", report.to_dict())
        self.folder.write_text("privacy_report.md", report.to_markdown())

    def planned(self) -> PrivacyPlan:
        """The privacy parameters that `fit` would train with; opens the data, trains nothing.

        Raises:
            ValueError: a faulty configuration or data set.
        """
        self._split = self._split_patients()
        return plan_privacy(self.config, len(self._split["train"]), self._store().folder.unit)

    def plan(self) -> PrivacyPlan:
        """The privacy parameters of the run in the folder."""
        return PrivacyPlan(**self.folder.read_json("plan.json"))

    def finished(self) -> TrainingResult | None:
        """What the run in the folder came to; None while steps or its evaluation are missing."""
        if not self._is_finished():
            return None
        stored = self.folder.read_json("metrics.json")["summary"]
        summary = {
            name: {key: math.nan if value is None else value for key, value in row.items()}
            for name, row in stored.items()
        }
        return self._result(summary, self.privacy_report())

    def _result(self, summary: Summary, report: PrivacyReport) -> TrainingResult:
        utility, root = self._utility(summary), self.folder.root
        return TrainingResult(root, summary, utility, self.metric, report.epsilon, report.steps)

    def exposed(self, patients: int) -> Exposed:
        """What an attack on the finished run needs.

        Args:
            patients: number of training patients to expose, at most.

        Raises:
            ValueError: the run has no weights yet.
        """
        self._split = self.folder.read_json("split.json")
        views = self._training_set()
        rows = [views[index] for index in range(min(patients, len(views)))]
        return Exposed(
            torch.stack([image[0] for image, _ in rows]).to(self.device),
            torch.stack([label[0] for _, label in rows]).to(self.device),
            self._trained_network(),
            self._build_criterion(),
        )

    def _is_finished(self) -> bool:
        """All steps taken and evaluated; an interrupted run may have been evaluated by hand."""
        evaluated = self.folder.metrics_json.exists()
        return evaluated and steps_begun(self.folder.ledger) >= self.plan().steps

    def _resumed(self, plan: PrivacyPlan) -> dict[str, Any] | None:
        differences = plan.differences(self.folder.read_json("plan.json"))
        if self.folder.read_json("split.json") != self._split:
            differences.append("the split of the patients")
        if differences:
            raise ValueError(
                "--resume: a privacy parameter of the run has changed, which its guarantee does "
                "not cover. Start a new run. Changed: " + "; ".join(differences)
            )
        if self._is_finished():
            raise ValueError(
                f"--resume: {self.folder.root} is finished, all {plan.steps} planned steps are "
                "taken; more would exceed the budget. Start a new run (training.init_from can "
                "start from its weights, but then the budgets add up). `evaluate` and `report` "
                "write its results again"
            )
        self.folder.metrics_json.unlink(missing_ok=True)  # of the weights so far
        return load_checkpoint(self.folder.last) if self.folder.last.exists() else None

    def _train(
        self,
        network: nn.Module,
        criterion: nn.Module,
        plan: PrivacyPlan,
        checkpoint: dict[str, Any] | None,
    ) -> int:
        training = self.config.training
        dataset = self._training_set()
        if plan.enabled:
            check_patients_do_not_mix(network.train(), criterion, dataset, self.device)
        loop = TrainingLoop(training, plan, self.folder, network, dataset, self._processes)
        if checkpoint is not None:
            loop.load_state_dict(checkpoint)

        def validate() -> float | None:
            if not self._processes.first:
                return None
            with loop.average.applied_to(network):
                return self._validate(network)

        counted = loop.run(
            rows_loss(criterion, self.device, training.precision), validate, self.display
        )
        if self._processes.first:
            columns = read_metrics(self.folder.metrics_csv)
            draw_progress(columns, plan, self.metric, self.folder.root / "progress.png")
        return counted

    def _report(self, plan: PrivacyPlan, steps: int) -> PrivacyReport:
        if not steps:
            raise ValueError(f"{self.folder.root}: no step was taken yet, nothing to report")
        data = self.folder.read_json("data.json")
        return build_report(
            self.config,
            plan,
            steps,
            read_metrics(self.folder.metrics_csv),
            self._by_products(),
            data["notes"],
            math.prod(data["view"]),
        )
