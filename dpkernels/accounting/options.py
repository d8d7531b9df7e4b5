"""What the command lines `account`, `risk` and `audit` share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

NoiseMultiplier = Annotated[
    float, typer.Option(help="Std of the noise divided by the clipping norm, > 0.")
]
SampleRate = Annotated[
    float, typer.Option(help="Chance of a record to join a step: batch size / dataset size.")
]
Steps = Annotated[int, typer.Option(help="Number of training steps.")]
Delta = Annotated[
    float, typer.Option(help="Probability left out of epsilon; well below 1 / dataset size.")
]


@contextlib.contextmanager
def refusing(option: str | None = None) -> Iterator[None]:
    """Show what the block refuses as a faulty argument: of `option`, where one is to blame."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


@contextlib.contextmanager
def plotting(path: Path) -> Iterator[None]:
    """Say where the figure is that the block draws for --plot, or why there is none."""
    with refusing("--plot"):
        yield
    typer.echo(f"figure: {path}", err=True)
