"""The study: every budget and seed trained, evaluated, bounded and attacked; killed, it goes on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from dpkernels.accounting.accountants import guaranteeing
from dpkernels.study import page, pictures, results
from dpkernels.study.campaign import (
    ADVERSARIES,
    DEFAULT_ADVERSARIES,
    AttackResult,
    attack_run,
    guess_without_model,
    participations,
)
from dpkernels.study.options import BUDGETS, budgets
from dpkernels.study.progress import StudyDisplay
from dpkernels.study.verdict import Verdict, conclude
from dpkernels.training.config import RunConfig
from dpkernels.training.logs import read_metrics
from dpkernels.training.privacy import PrivacyPlan
from dpkernels.training.run_folder import RunFolder, steps_begun
from dpkernels.training.settings import merge, require
from dpkernels.training.trainer import Exposed, Trainer, TrainingResult

_ATTACK_WEIGHT = 0.05
_CHECKPOINTS = 20


@dataclass(frozen=True)
class StudySettings:
    """What a study compares.

    Attributes:
        epsilons: nominal budgets; infinite: without privacy.
        accountant: what a budget means: "rdp" (Opacus' accountant at its default orders, as in
            most publications), "tight" (what the noise guarantees) or another upper bound.
        seeds: runs for each budget, with other initialisations and splits.
        patients: training patients to attack in each run.
        adversaries: keys of `campaign.ADVERSARIES`.
    """

    epsilons: tuple[float, ...] = budgets(BUDGETS)
    accountant: str = "rdp"
    seeds: int = 1
    patients: int = 8
    adversaries: tuple[str, ...] = DEFAULT_ADVERSARIES

    def __post_init__(self) -> None:
        accountants = guaranteeing()
        rules = {
            "epsilons": (
                bool(self.epsilons) and all(e > 0 for e in self.epsilons),
                "positive numbers or inf, separated by commas",
            ),
            "accountant": (self.accountant in accountants, f"one of {', '.join(accountants)}"),
            "seeds": (self.seeds >= 1, "at least 1"),
            "patients": (self.patients >= 1, "at least 1"),
            "adversaries": (
                bool(self.adversaries) and all(name in ADVERSARIES for name in self.adversaries),
                f"some of {', '.join(ADVERSARIES)}",
            ),
        }
        for name, (right, expected) in rules.items():
            require(right, name, getattr(self, name), expected)

    @property
    def budgets(self) -> tuple[float, ...]:
        """The budgets, each once, rising."""
        return tuple(sorted(set(self.epsilons)))


@dataclass(frozen=True)
class StudyReport:
    """What a study came to.

    Attributes:
        folder: where everything lies; `report.html` first.
        rows: by rising budget.
        verdict: in words.
        head, body: the table as it is written everywhere.
    """

    folder: Path
    rows: list[results.Row]
    verdict: Verdict
    head: list[str]
    body: list[list[str]]


class Study:
    """Train, evaluate and attack at each budget, for each seed.

    Results lie in cells, one folder for each budget and seed, written whole or not at all; a
    study that is run again takes up what is there, a half-trained run included.

    Args:
        trainer: class of the task.
        config: of the runs; budget and seed are replaced.
        settings: what to compare.
        out: folder of the study.
        console: where progress goes; None: nowhere.
    """

    def __init__(
        self,
        trainer: type[Trainer],
        config: RunConfig,
        settings: StudySettings,
        out: str | Path,
        console: Console | None = None,
    ) -> None:
        self.settings = settings
        self.root = Path(out)
        self._trainer = trainer
        self._config = config
        self._console = console
        self._plans: dict[float, PrivacyPlan] = {}

    def plan(self) -> dict[float, PrivacyPlan]:
        """The noise of every budget; opens the data, trains nothing.

        Raises:
            ValueError: a faulty configuration, or a budget that no noise can meet.
        """
        for epsilon in self.settings.budgets:
            if epsilon not in self._plans:
                privacy = {
                    "enabled": math.isfinite(epsilon),
                    "epsilon": epsilon,
                    "noise_multiplier": None,
                    "accountant": self.settings.accountant,
                }
                trainer = self._make(self._cells / "plan", {"privacy": privacy}, None)
                self._plans[epsilon] = trainer.planned()
        return self._plans

    def run(self) -> StudyReport:
        """Do what is not done yet, then write table, pictures and page.

        Raises:
            ValueError: a faulty configuration, or a folder that holds another study.
            OSError: the folder cannot be written.
        """
        self._cells.mkdir(parents=True, exist_ok=True)
        self._check_same_study()
        plans = self.plan()
        cells = [(epsilon, seed) for seed in range(self.settings.seeds) for epsilon in plans]
        self._do(cells)
        return self._report(cells)

    def _do(self, cells: list[tuple[float, int]]) -> None:
        steps = self._config.training.steps
        attack = _ATTACK_WEIGHT * steps
        each = steps + attack * len(self.settings.adversaries)
        with StudyDisplay(self._console, each * len(cells)) as display:
            for number, (epsilon, seed) in enumerate(cells, 1):
                cell = self._cell(epsilon, seed)
                if (cell / "study.json").exists():
                    display.advance(each, skipped=True)
                    continue
                place = f"run {number} of {len(cells)}: epsilon {results.budget(epsilon)}"
                display.title(f"{place}, training")
                trainer = self._make(cell, self._changes(epsilon, seed), display)
                result = trainer.finished()
                if result is None:
                    result = trainer.fit(resume=steps_begun(trainer.folder.ledger) > 0)
                else:
                    display.advance(steps, skipped=True)
                display.title(f"{place}, attack")
                found = self._attack(trainer, result, lambda done: display.advance(done * attack))
                found |= {"epsilon": epsilon, "seed": seed}
                RunFolder(cell).write_json("study.json", found)

    def _attack(
        self, trainer: Trainer, result: TrainingResult, on_progress: Callable[[float], None]
    ) -> dict[str, Any]:
        """Attack a finished run; returns what is stored of it."""
        began = time.monotonic()
        folder, plan = trainer.folder, trainer.plan()
        exposed = trainer.exposed(self.settings.patients)
        found = attack_run(exposed, plan, self.settings.adversaries, on_progress)
        pictures.save_sections(found, exposed, folder.root / "sections.npz")
        return {
            **_attacked(plan, exposed, found),
            "epsilon_tight": plan.epsilon(accountant="tight"),
            "utility": result.utility,
            "metric": result.metric,
            "summary": result.summary,
            "plan": plan.to_dict(),
            "environment": folder.read_json("env.json"),
            "seconds": {
                "training": round(sum(read_metrics(folder.metrics_csv)["seconds"]), 1),
                "attacks": round(time.monotonic() - began, 1),
            },
        }

    def _report(self, cells: list[tuple[float, int]]) -> StudyReport:
        stored = [RunFolder(self._cell(*cell)).read_json("study.json") for cell in cells]
        rows = results.rows_of(stored)
        titles = {name: ADVERSARIES[name].title for name in self.settings.adversaries}
        metric, plan = stored[0]["metric"], PrivacyPlan(**stored[0]["plan"])
        verdict = conclude(rows, metric, titles, plan.unit)
        head, body = results.table(rows, metric, titles)
        folder = RunFolder(self.root)
        folder.write_text("table.csv", results.to_csv(head, body))
        folder.write_text("table.md", results.to_markdown(head, body))
        folder.write_json(
            "study.json",
            {
                "settings": asdict(self.settings),
                "rows": [asdict(row) for row in rows],
                "verdict": asdict(verdict),
            },
        )
        shown = [
            (results.budget(e), pictures.load_sections(self._cell(e, 0) / "sections.npz"))
            for e in self.settings.budgets
        ]
        heading = (
            f"By epsilon: the record that the attack '{next(iter(titles.values()))}' rebuilt best, "
            "and what each attack made of it"
        )
        pictures.draw_grid(shown, titles, self.root / "grid.png", heading)
        pictures.draw_curves(rows, metric, titles, self.root / "curves.png")
        folder.write_text(
            "report.html",
            page.render(
                head,
                body,
                verdict.sentences,
                page.facts(stored, self.settings.accountant, self.settings.seeds),
                {name: ADVERSARIES[name] for name in titles},
                {
                    "Best reconstruction at each budget": self.root / "grid.png",
                    "Privacy, utility and risk": self.root / "curves.png",
                },
            ),
        )
        return StudyReport(self.root, rows, verdict, head, body)

    def _check_same_study(self) -> None:
        """Cells of other data, another network or other attacks must not be mixed."""
        same = {
            "config": merge(self._config.to_dict(), {"privacy": {"epsilon": None}}),
            "accountant": self.settings.accountant,
            "patients": self.settings.patients,
            "adversaries": list(self.settings.adversaries),
        }
        folder = RunFolder(self.root)
        if not (self.root / "settings.json").exists():
            folder.write_json("settings.json", same)
        differing = _differences(folder.read_json("settings.json"), same)
        if differing:
            raise ValueError(
                f"--out: {self.root} holds a study with other settings; choose another folder. "
                f"Different: {', '.join(differing)}"
            )

    def _changes(self, epsilon: float, seed: int) -> dict[str, Any]:
        plan = self.plan()[epsilon]
        privacy: dict[str, Any] = {"enabled": plan.enabled}
        if plan.enabled:
            privacy |= {
                "epsilon": None,
                "noise_multiplier": plan.noise_multiplier,
                "accountant": "tight",
            }
        every = self._config.training.checkpoint_every
        every = every or max(1, self._config.training.steps // _CHECKPOINTS)
        seed += self._config.training.seed
        return {"privacy": privacy, "training": {"seed": seed, "checkpoint_every": every}}

    def _make(self, out: Path, changes: dict[str, Any], display: Any) -> Trainer:
        values = merge(self._config.to_dict(), changes)
        return self._trainer(type(self._config).from_dict(values), out, display)

    @property
    def _cells(self) -> Path:
        return self.root / "cells"

    def _cell(self, epsilon: float, seed: int) -> Path:
        return self._cells / f"epsilon-{results.budget(epsilon)}-seed{seed}"


def _differences(stored: Any, wanted: Any, path: str = "") -> list[str]:
    if isinstance(stored, dict) and isinstance(wanted, dict):
        return [
            found
            for key in {**stored, **wanted}
            for found in _differences(stored.get(key), wanted.get(key), f"{path}{key}.")
        ]
    return [] if stored == wanted else [f"{path[:-1]} was {stored!r}, is {wanted!r}"]


def _attacked(
    plan: PrivacyPlan, exposed: Exposed, found: dict[str, AttackResult]
) -> dict[str, Any]:
    """What is stored of the attacks on one run, beside the bounds for it."""
    norms = exposed.images.flatten(1).float().norm(dim=1).tolist()
    dimension = exposed.images[0].numel()
    observations = participations(plan) if plan.noise_multiplier else 1
    return {
        "noise_multiplier": plan.noise_multiplier,
        "dimension": dimension,
        "data_norms": [round(norm, 3) for norm in norms],
        "risk": asdict(results.risk_of(plan, dimension, observations)),
        "prior_ncc": guess_without_model(exposed),
        "attacks": {name: attack.to_dict() for name, attack in found.items()},
    }


def attack_folder(
    trainer: Trainer, adversaries: tuple[str, ...], patients: int, console: Console | None
) -> dict[str, AttackResult]:
    """Attack one finished run: writes attack/attack.json and attack/reconstructions.png.

    Args:
        trainer: of the run, from `Trainer.from_run`.
        adversaries: keys of `campaign.ADVERSARIES`.
        patients: training patients to attack.
        console: where progress goes; None: nowhere.

    Raises:
        ValueError: no such adversary, no patients, or the run has no weights yet.
    """
    if patients < 1:
        raise ValueError(f"--patients must be at least 1; got {patients}")
    trainer.folder.check_writable()
    plan = trainer.plan()
    with StudyDisplay(console, len(adversaries)) as display:
        display.title("Attacking")
        exposed = trainer.exposed(patients)
        found = attack_run(exposed, plan, adversaries, display.advance)
    out = trainer.folder.root / "attack"
    out.mkdir(exist_ok=True)
    stated = {"max_grad_norm": plan.max_grad_norm, "participations": participations(plan)}
    RunFolder(out).write_json("attack.json", {**_attacked(plan, exposed, found), **stated})
    pictures.draw_patients(found, exposed, out / "reconstructions.png")
    return found
