"""`dpkernels classify ...`: the commands of image classification."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dpkernels import classification
from dpkernels.classification.presets import PRESETS
from dpkernels.study.command_line import command_line
from dpkernels.study.options import names
from dpkernels.training import options
from dpkernels.training.task import Prediction, Setting, Task

_HELP = """Train image classifiers with differential privacy, counted per patient.

Start with `dpkernels classify train`: it draws synthetic skin lesions, trains on them at epsilon 8
and leaves a run folder with metrics, pictures and a privacy report. Then pass your own data with
--data: HAM10000 (HAM10000_metadata.csv and its image folders), RadImageNet (CSV tables with
filename,label), or one folder of images per class."""


TASK = Task(
    name="classify",
    help=_HELP,
    trainer=lambda: classification.ClassificationTrainer,  # loaded on use
    presets=tuple(PRESETS),
    record="image",
    columns={
        "MCC": ("mcc", ".3f"),
        "accuracy": ("accuracy", ".3f"),
        "balanced": ("balanced_accuracy", ".3f"),
        "recall": ("recall", ".3f"),
        "images": ("images", "d"),
    },
    data="Folder of images. Default: synthetic skin lesions.",
    subjects="images",
    metrics="MCC, accuracy, and every held-out image",
    examples={
        "train": (
            "train",
            "train --data HAM10000 --preset ham10000 --epsilon 8 --out runs/skin",
            "train --data my_images --positive '' --set data.size=64 --out runs/mine",
            "train --resume --out runs/skin",
        ),
        "attack": ("attack runs/skin --attacks imprint,optimal",),
        "study": (
            "study --epsilons 1,8,1e6,inf",
            "study --data HAM10000 --preset ham10000 --out runs/skin-study",
        ),
    },
    study_out="runs/classify-study",
    prediction=Prediction(
        "Classify new images: one line each, with the probability of every class.",
        "Image or folder of them.",
        "CSV to write.",
        "predictions",
    ),
    settings=(
        Setting(
            "positive",
            "data.positive",
            "Classes to tell from all others, such as mel,bcc; '' for all classes. Default of "
            "synthetic and ham10000: akiec,bcc,mel, the malignant or nearly so.",
            names,
        ),
    ),
)

app = command_line(TASK)


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

    with options.writing("Drawing", lesions) as advance:
        write_synthetic(
            folder, lesions=lesions, size=size, seed=seed, layout=layout, on_progress=advance
        )


if __name__ == "__main__":
    app()
