"""`dpkernels classify ...`: the commands of image classification (attack, study: `study.py`)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dpkernels.classification import study
from dpkernels.training import options

if TYPE_CHECKING:
    from rich.table import Table

_HELP = """Train image classifiers with differential privacy, counted per patient.

Start with `dpkernels classify train`: it draws synthetic skin lesions, trains on them at epsilon 8
and leaves a run folder with metrics, pictures and a privacy report. Then pass your own data with
--data: HAM10000 (HAM10000_metadata.csv and its image folders), RadImageNet (CSV tables with
filename,label), or one folder of images per class."""

app = typer.Typer(help=_HELP, no_args_is_help=True)
study.register(app)


def register(parent: typer.Typer) -> None:
    """Add the `classify` commands to the command line of the package."""
    parent.add_typer(app, name="classify", help=_HELP)


@app.command()
def train(
    data: Annotated[
        Path | None, typer.Option(help="Folder of images. Default: synthetic skin lesions.")
    ] = None,
    preset: Annotated[
        str, typer.Option(help="Named starting point: synthetic, ham10000, radimagenet.")
    ] = "synthetic",
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
        typer.Option(help="CSV with columns image,patient_id when patients have several images."),
    ] = None,
    positive: Annotated[
        str | None,
        typer.Option(
            help="Classes to tell from all others, such as mel,bcc; '' for all classes. Default "
            "of synthetic and ham10000: akiec,bcc,mel, the malignant or nearly so."
        ),
    ] = None,
    seed: options.Seed = None,
    device: options.Device = None,
    out: options.Out = None,
    resume: options.Resume = False,
) -> None:
    """Train, evaluate and report; everything lands in one run folder.

    Examples:

      dpkernels classify train

      dpkernels classify train --data HAM10000 --preset ham10000 --epsilon 8 --out runs/skin

      dpkernels classify train --data my_images --positive '' --set data.size=64 --out runs/mine

      dpkernels classify train --resume --out runs/skin
    """
    from dpkernels.classification.config import ClassificationConfig
    from dpkernels.classification.trainer import ClassificationTrainer

    console = options.console()
    with options.PlainErrors(console, options.RESUME):
        start = options.configuration(
            ClassificationConfig,
            preset=preset,
            out=out,
            resume=resume,
            config=config,
            changes={
                **options.common_changes(
                    data=data, patients_csv=patients, steps=steps, device=device
                ),
                "data.positive": None if positive is None else _names(positive),
                "training.seed": seed,
                "privacy.insecure_fixed_noise": insecure_fixed_noise,
                **options.privacy_changes(epsilon, delta, noise_multiplier, non_private),
            },
            overrides=override or [],
        )
        trainer = ClassificationTrainer(start, out, options.display(console))
        console.print(f"Run folder: [bold]{trainer.folder.root}[/]", highlight=False)
        result = trainer.fit(resume=resume)
        console.print(_metrics_table(result.summary))
        unit = trainer.folder.read_json("data.json")["unit"]
        options.print_outcome(
            console,
            result,
            unit,
            {
                "metrics.json": "MCC, accuracy, and every held-out image",
                "overlays/": "held-out images with truth and prediction",
            },
        )


@app.command()
def evaluate(run: options.Run) -> None:
    """Evaluate a run again on its held-out images (metrics.json, overlays/)."""
    from dpkernels.classification.trainer import ClassificationTrainer

    console = options.console()
    with options.PlainErrors(console):
        trainer = ClassificationTrainer.from_run(run, options.display(console))
        trainer.evaluate()
        console.print(_metrics_table(trainer.folder.read_json("metrics.json")["summary"]))


@app.command()
def predict(
    run: options.Run,
    source: Annotated[Path, typer.Argument(metavar="IN", help="Image or folder of them.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="CSV to write.")],
) -> None:
    """Classify new images: one line each, with the probability of every class."""
    from dpkernels.classification.trainer import ClassificationTrainer

    console = options.console()
    with options.PlainErrors(console):
        count = ClassificationTrainer.from_run(run).predict(source, target)
        console.print(f"Wrote {count} predictions to {target}", highlight=False)


@app.command()
def report(run: options.Run) -> None:
    """Print the privacy report of a run (privacy_report.md, privacy_report.json)."""
    from dpkernels.classification.trainer import ClassificationTrainer

    console = options.console()
    with options.PlainErrors(console):
        options.print_report(console, ClassificationTrainer.from_run(run))


@app.command()
def synthetic(
    folder: Annotated[Path, typer.Argument(help="Folder to create.")],
    lesions: Annotated[int, typer.Option(help="Number of synthetic lesions.")] = 720,
    size: Annotated[int, typer.Option(help="Pixels along each side.")] = 32,
    seed: Annotated[int, typer.Option(help="Another seed gives other lesions.")] = 0,
    layout: Annotated[str, typer.Option(help="ham10000, folders or table.")] = "ham10000",
) -> None:
    """Write the synthetic skin lesions in the layout of a public data set."""
    from dpkernels.classification.synthetic import write_synthetic

    console = options.console()
    display = options.display(console)
    with options.PlainErrors(console), display.counting("Drawing", lesions) as advance:
        write_synthetic(
            folder, lesions=lesions, size=size, seed=seed, layout=layout, on_progress=advance
        )


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _metrics_table(summary: dict[str, dict[str, float]]) -> Table:
    from rich.table import Table

    table = Table(title="Held-out images")
    for column in ("class", "MCC", "accuracy", "balanced", "recall", "images"):
        table.add_column(column, justify="left" if column == "class" else "right")
    for name, row in summary.items():
        figures = [row.get(key) for key in ("mcc", "accuracy", "balanced_accuracy", "recall")]
        table.add_row(name, *map(_figure, figures), str(row["images"]))
    return table


def _figure(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"


if __name__ == "__main__":
    app()
