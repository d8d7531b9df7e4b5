"""`dpkernels classify attack | study`: what an attacker gets out of a run, and at which budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dpkernels.study import options as comparing
from dpkernels.training import options


def attack(
    run: options.Run,
    attacks: comparing.Attacks = comparing.ATTACKS,
    patients: comparing.Attacked = 8,
) -> None:
    """Attack a run: rebuild its training images from the gradients it would release.

    Uses the run's own data, clipping bound and noise. Writes attack/attack.json and
    attack/reconstructions.png into the run folder, and prints how near each attack comes: the
    correlation (NCC) of reconstruction and image, beside what pure noise reaches.

    Example: dpkernels classify attack runs/skin --attacks imprint,optimal
    """
    from dpkernels.classification.trainer import ClassificationTrainer
    from dpkernels.study import commands

    console = options.console()
    with options.PlainErrors(console):
        trainer = ClassificationTrainer.from_run(run)
        commands.attack(console, trainer, comparing.names(attacks), patients)


def study(
    epsilons: comparing.Epsilons = comparing.BUDGETS,
    accountant: comparing.Accountant = "rdp",
    seeds: comparing.Seeds = 1,
    data: Annotated[
        Path | None, typer.Option(help="Folder of images. Default: synthetic skin lesions.")
    ] = None,
    patients_csv: Annotated[
        Path | None,
        typer.Option(
            "--patients",
            help="CSV with columns image,patient_id when patients have several images.",
        ),
    ] = None,
    preset: Annotated[
        str, typer.Option(help="Starting point: synthetic, ham10000, radimagenet.")
    ] = "synthetic",
    config: options.ConfigFile = None,
    override: options.Override = None,
    steps: options.Steps = None,
    device: options.Device = None,
    attacks: comparing.Attacks = comparing.ATTACKS,
    attacked: comparing.Attacked = 8,
    out: comparing.StudyOut = Path("runs/classify-study"),
    dry_run: comparing.DryRun = False,
) -> None:
    """Train at several budgets, attack each run, and put utility beside risk.

    Writes report.html (open it first), table.csv, table.md, grid.png and curves.png. Stopped or
    killed, it goes on when it is started again with the same --out; more budgets and seeds can be
    added that way too.

    Examples:

      dpkernels classify study --epsilons 1,8,1e6,inf

      dpkernels classify study --data HAM10000 --preset ham10000 --out runs/skin-study
    """
    from dpkernels.classification.config import ClassificationConfig
    from dpkernels.classification.trainer import ClassificationTrainer
    from dpkernels.study import commands
    from dpkernels.study.runner import Study

    console = options.console()
    with options.PlainErrors(console, options.AGAIN):
        start = options.configuration(
            ClassificationConfig,
            preset=preset,
            out=None,
            resume=False,
            config=config,
            changes=options.common_changes(
                data=data, patients_csv=patients_csv, steps=steps, device=device
            ),
            overrides=override or [],
        )
        settings = comparing.settings(epsilons, accountant, seeds, attacked, attacks)
        chosen = Study(ClassificationTrainer, start, settings, out, console)
        commands.study(console, chosen, dry_run)


def register(app: typer.Typer) -> None:
    """Add the two commands."""
    app.command()(attack)
    app.command()(study)
