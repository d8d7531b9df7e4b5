"""`dpkernels segment ...`: the commands of 3D segmentation (attack and study: `study.py`)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dpkernels.segmentation import study
from dpkernels.training import options

if TYPE_CHECKING:
    from rich.table import Table

_HELP = """Train 3D segmentation models with differential privacy, counted per patient.

Start with `dpkernels segment train`: it writes a synthetic liver data set, trains on it at
epsilon 8 and leaves a run folder with metrics, pictures and a privacy report. Then pass your own
data with --data: a Medical Segmentation Decathlon folder (dataset.json, imagesTr, labelsTr)."""

app = typer.Typer(help=_HELP, no_args_is_help=True)
study.register(app)


def register(parent: typer.Typer) -> None:
    """Add the `segment` commands to the command line of the package."""
    parent.add_typer(app, name="segment", help=_HELP)


@app.command()
def train(
    data: Annotated[
        Path | None,
        typer.Option(help="Decathlon folder. Default: the embedded synthetic phantom."),
    ] = None,
    preset: Annotated[
        str,
        typer.Option(
            help="Named starting point: phantom, phantom-study, msd-liver, msd-liver-fast."
        ),
    ] = "phantom",
    epsilon: options.Epsilon = None,
    delta: options.Delta = None,
    noise_multiplier: options.NoiseMultiplier = None,
    insecure_fixed_noise: options.InsecureFixedNoise = None,
    non_private: options.NonPrivate = False,
    config: options.ConfigFile = None,
    override: options.Override = None,
    steps: options.Steps = None,
    patients: Annotated[
        Path | None,
        typer.Option(help="CSV with columns scan,patient_id when patients have several scans."),
    ] = None,
    seed: options.Seed = None,
    device: options.Device = None,
    out: options.Out = None,
    resume: options.Resume = False,
) -> None:
    """Train, evaluate and report; everything lands in one run folder.

    Examples:

      dpkernels segment train

      dpkernels segment train --data Task03_Liver --preset msd-liver --epsilon 8 --out runs/liver

      dpkernels segment train --resume --out runs/liver
    """
    from dpkernels.segmentation.config import SegmentationConfig
    from dpkernels.segmentation.trainer import SegmentationTrainer

    console = options.console()
    with options.PlainErrors(console, options.RESUME):
        start = options.configuration(
            SegmentationConfig,
            preset=preset,
            out=out,
            resume=resume,
            config=config,
            changes={
                **options.common_changes(
                    data=data, patients_csv=patients, steps=steps, device=device
                ),
                "training.seed": seed,
                "privacy.insecure_fixed_noise": insecure_fixed_noise,
                **options.privacy_changes(epsilon, delta, noise_multiplier, non_private),
            },
            overrides=override or [],
        )
        trainer = SegmentationTrainer(start, out, options.display(console))
        console.print(f"Run folder: [bold]{trainer.folder.root}[/]", highlight=False)
        result = trainer.fit(resume=resume)
        console.print(_metrics_table(result.summary))
        options.print_outcome(
            console,
            result,
            trainer.plan().unit,
            {
                "metrics.json": "Dice and surface distance per class and case",
                "overlays/": "held-out scans with truth and prediction",
            },
        )


@app.command()
def evaluate(run: options.Run) -> None:
    """Evaluate a run again on its held-out patients (metrics.json, overlays/)."""
    from dpkernels.segmentation.evaluate import summarise
    from dpkernels.segmentation.trainer import SegmentationTrainer

    console = options.console()
    with options.PlainErrors(console):
        results = SegmentationTrainer.from_run(run, options.display(console)).evaluate()
        console.print(_metrics_table(summarise(results)))


@app.command()
def predict(
    run: options.Run,
    source: Annotated[Path, typer.Argument(metavar="IN", help="NIfTI file or folder of them.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the label maps.")],
) -> None:
    """Segment new scans; each label map lies on the grid of its own file."""
    from dpkernels.segmentation.trainer import SegmentationTrainer

    console = options.console()
    with options.PlainErrors(console):
        written = SegmentationTrainer.from_run(run, options.display(console)).predict(
            source, target
        )
        console.print(f"Wrote {len(written)} label maps to {target}", highlight=False)


@app.command()
def report(run: options.Run) -> None:
    """Print the privacy report of a run (privacy_report.md, privacy_report.json)."""
    from dpkernels.segmentation.trainer import SegmentationTrainer

    console = options.console()
    with options.PlainErrors(console):
        options.print_report(console, SegmentationTrainer.from_run(run))


@app.command()
def phantom(
    folder: Annotated[Path, typer.Argument(help="Folder to create.")],
    patients: Annotated[int, typer.Option(help="Number of synthetic patients.")] = 112,
    size: Annotated[int, typer.Option(help="Voxels along the longest axis.")] = 48,
    seed: Annotated[int, typer.Option(help="Another seed gives another cohort.")] = 0,
) -> None:
    """Write the synthetic liver data set as a Medical Segmentation Decathlon folder."""
    from dpkernels.segmentation.phantom import write_phantom

    console = options.console()
    with (
        options.PlainErrors(console),
        options.display(console).counting("Writing", patients) as advance,
    ):
        write_phantom(folder, patients=patients, size=size, seed=seed, on_progress=advance)


def _metrics_table(summary: dict[str, dict[str, float]]) -> Table:
    from rich.table import Table

    table = Table(title="Held-out patients")
    for column in ("class", "Dice", "spread", "HD95, mm", "cases"):
        table.add_column(column, justify="left" if column == "class" else "right")
    for name, row in summary.items():
        table.add_row(
            name,
            _figure(row["dice"], 3),
            _figure(row["dice_std"], 3),
            _figure(row["hd95"], 1),
            str(row["cases"]),
        )
    return table


def _figure(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


if __name__ == "__main__":
    app()
