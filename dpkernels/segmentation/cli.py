"""`dpkernels segment ...`: the commands of 3D segmentation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dpkernels import segmentation
from dpkernels.segmentation.presets import PRESETS
from dpkernels.study.command_line import command_line
from dpkernels.training import options
from dpkernels.training.task import Prediction, Task

_HELP = """Train 3D segmentation models with differential privacy, counted per patient.

Start with `dpkernels segment train`: it writes a synthetic liver data set, trains on it at
epsilon 8 and leaves a run folder with metrics, pictures and a privacy report. Then pass your own
data with --data: a Medical Segmentation Decathlon folder (dataset.json, imagesTr, labelsTr)."""


TASK = Task(
    name="segment",
    help=_HELP,
    trainer=lambda: segmentation.SegmentationTrainer,  # loaded on use
    presets=tuple(PRESETS),
    record="scan",
    columns={
        "Dice": ("dice", ".3f"),
        "spread": ("dice_std", ".3f"),
        "HD95, mm": ("hd95", ".1f"),
        "cases": ("cases", "d"),
    },
    data="Decathlon folder. Default: the embedded synthetic phantom.",
    metrics="Dice and surface distance per class and case",
    examples={
        "train": (
            "train",
            "train --data Task03_Liver --preset msd-liver --epsilon 8 --out runs/liver",
            "train --resume --out runs/liver",
        ),
        "attack": ("attack runs/liver --attacks imprint,optimal",),
        "study": ("study", "study --data Task03_Liver --preset msd-liver --out runs/liver-study"),
    },
    study_preset="phantom-study",
    prediction=Prediction(
        "Segment new scans; each label map lies on the grid of its own file.",
        "NIfTI file or folder of them.",
        "Folder for the label maps.",
        "label maps",
    ),
)

app = command_line(TASK)


@app.command()
def phantom(
    folder: Annotated[Path, typer.Argument(help="Folder to create.")],
    patients: Annotated[int, typer.Option(help="Number of synthetic patients.")] = 112,
    size: Annotated[int, typer.Option(help="Voxels along the longest axis.")] = 48,
    seed: Annotated[int, typer.Option(help="Another seed gives another cohort.")] = 0,
) -> None:
    """Write the synthetic liver data set as a Medical Segmentation Decathlon folder."""
    from dpkernels.segmentation.phantom import write_phantom

    with options.writing("Writing", patients) as advance:
        write_phantom(folder, patients=patients, size=size, seed=seed, on_progress=advance)


if __name__ == "__main__":
    app()
