"""`dpkernels segment attack | study`: what an attacker gets out of a run, and at which budget."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dpkernels.study import options as comparing
from dpkernels.training import options

if TYPE_CHECKING:
    from rich.console import Console

    from dpkernels.segmentation.config import SegmentationConfig
    from dpkernels.study.runner import StudyReport, StudySettings


def run_study(
    config: SegmentationConfig,
    settings: StudySettings,
    out: str | Path,
    console: Console | None = None,
) -> StudyReport:
    """Train, evaluate and attack at each budget; run again, it goes on where it stopped.

    Args:
        config: of the runs; budget and seed are replaced.
        settings: budgets, accountant, seeds, attacks.
        out: folder of the study.
        console: where progress goes; None: nowhere.

    Raises:
        ValueError: a faulty configuration, or a folder that holds another study.
        OSError: the folder cannot be written.
    """
    from dpkernels.segmentation.trainer import SegmentationTrainer
    from dpkernels.study.runner import Study

    return Study(SegmentationTrainer, config, settings, out, console).run()


def attack(
    run: options.Run,
    attacks: comparing.Attacks = comparing.ATTACKS,
    patients: comparing.Attacked = 8,
) -> None:
    """Attack a run: rebuild its training patients from the gradients it would release.

    Uses the run's own data, clipping bound and noise. Writes attack/attack.json and
    attack/reconstructions.png into the run folder, and prints how near each attack comes: the
    correlation (NCC) of reconstruction and scan, beside what pure noise reaches.

    Example: dpkernels segment attack runs/liver --attacks imprint,optimal
    """
    from dpkernels.segmentation.trainer import SegmentationTrainer
    from dpkernels.study import commands

    console = options.console()
    with options.PlainErrors(console):
        commands.attack(
            console, SegmentationTrainer.from_run(run), comparing.names(attacks), patients
        )


def study(
    epsilons: comparing.Epsilons = comparing.BUDGETS,
    accountant: comparing.Accountant = "rdp",
    seeds: comparing.Seeds = 1,
    data: Annotated[
        Path | None,
        typer.Option(help="Decathlon folder. Default: the embedded synthetic phantom."),
    ] = None,
    patients_csv: Annotated[
        Path | None,
        typer.Option(
            "--patients", help="CSV with columns scan,patient_id when patients have several scans."
        ),
    ] = None,
    preset: Annotated[
        str,
        typer.Option(help="Starting point: phantom-study, phantom, msd-liver, msd-liver-fast."),
    ] = "phantom-study",
    config: options.ConfigFile = None,
    override: options.Override = None,
    steps: options.Steps = None,
    device: options.Device = None,
    attacks: comparing.Attacks = comparing.ATTACKS,
    attacked: comparing.Attacked = 8,
    out: comparing.StudyOut = Path("runs/study"),
    dry_run: comparing.DryRun = False,
) -> None:
    """Train at several budgets, attack each run, and put utility beside risk.

    Writes report.html (open it first), table.csv, table.md, grid.png and curves.png. Stopped or
    killed, it goes on when it is started again with the same --out; more budgets and seeds can be
    added that way too.

    Examples:

      dpkernels segment study

      dpkernels segment study --data Task03_Liver --preset msd-liver --out runs/liver-study
    """
    from dpkernels.segmentation.config import SegmentationConfig
    from dpkernels.segmentation.trainer import SegmentationTrainer
    from dpkernels.study import commands
    from dpkernels.study.runner import Study

    console = options.console()
    with options.PlainErrors(console, options.AGAIN):
        start = options.configuration(
            SegmentationConfig,
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
        commands.study(console, Study(SegmentationTrainer, start, settings, out, console), dry_run)


def register(app: typer.Typer) -> None:
    """Add the two commands."""
    app.command()(attack)
    app.command()(study)
