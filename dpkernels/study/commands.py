"""What the commands `attack` and `study` of every task print."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from dpkernels.study import results
from dpkernels.study.campaign import ADVERSARIES, ETA, participations
from dpkernels.study.runner import Study, attack_folder
from dpkernels.training.options import print_files
from dpkernels.training.trainer import Trainer


def attack(console: Console, trainer: Trainer, adversaries: tuple[str, ...], patients: int) -> None:
    """Attack a finished run and print how near each adversary came."""
    found = attack_folder(trainer, adversaries, patients, console)
    plan = trainer.plan()
    console.print(
        f"Noise multiplier {plan.noise_multiplier:.4g}, clipping bound {plan.max_grad_norm:g}, "
        f"{participations(plan)} updates with one {plan.unit} in a typical run.",
        highlight=False,
    )
    count = len(next(iter(found.values())).matches)
    shown = Table(
        title=f"Medians over {count} {plan.unit}{'s' * (count > 1)}; success: 1 - NCC below {ETA}"
    )
    shown.add_column("attack", no_wrap=True)
    for column in ("NCC", "best", "chance", "SSIM", "PSNR, dB", "success"):
        shown.add_column(column, justify="right")
    for name, result in found.items():
        shown.add_row(
            ADVERSARIES[name].title,
            f"{result.median('ncc'):.3f}",
            f"{result.matches[result.best].ncc:.3f}",
            f"{result.chance:.3f}",
            f"{result.median('ssim'):.3f}",
            f"{result.median('psnr'):.1f}",
            f"{result.success:.0%}",
        )
    console.print(shown)
    files = {"attack.json": "every number", "reconstructions.png": "records and reconstructions"}
    print_files(console, trainer.folder.root / "attack", files)


def study(console: Console, study: Study, dry_run: bool) -> None:
    """Show what a study is going to do, do it, and print what it came to."""
    plans = study.plan()
    planned = Table(title="Planned")
    for column in ("epsilon", "noise multiplier", "epsilon, tight", "worst case, at most"):
        planned.add_column(column, justify="right")
    for epsilon, plan in plans.items():
        tight = plan.epsilon(accountant="tight")
        risk = results.risk_of(plan, 1, participations(plan))
        planned.add_row(
            results.budget(epsilon),
            f"{plan.noise_multiplier:.4g}",
            "-" if tight is None else f"{tight:.4g}",
            f"{risk.worst_case:.3g}",
        )
    console.print(planned)
    steps, runs = next(iter(plans.values())).steps, len(plans) * study.settings.seeds
    console.print(f"{runs} runs of {steps} steps, into {study.root}", highlight=False)
    if dry_run:
        return
    report = study.run()
    shown = Table(title="Privacy, utility and risk")
    picked = [  # what fits a terminal: budget, utility, worst case and NCC; the files have all
        index
        for index, title in enumerate(report.head)
        if index in (0, 3, 5) or (title.startswith("NCC") and "bound" not in title)
    ]
    for index in picked:
        shown.add_column(report.head[index], justify="right")
    for line in report.body:
        shown.add_row(*[line[index] for index in picked])
    console.print(shown)
    for sentence in report.verdict.sentences:
        console.print(f"- {sentence}", highlight=False, soft_wrap=True)
    files = {
        "report.html": "table, pictures and conclusion in one file",
        "table.csv, table.md": "the table",
        "grid.png": "best reconstruction at each budget",
        "curves.png": "utility and risk over the budgets",
    }
    print_files(console, report.folder, files)
