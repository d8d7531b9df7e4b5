"""The figures that `dpkernels account` and the risk report draw. Needs matplotlib, on use only."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@contextlib.contextmanager
def drawing(path: str | Path) -> Iterator[Axes]:
    """Axes to draw on; the figure is written when the block ends.

    Args:
        path: image file to write; the suffix chooses the format.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "the figure needs matplotlib: pip install 'dpkernels[segmentation]' or matplotlib"
        ) from error
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    yield figure.add_subplot()
    figure.savefig(path, dpi=150)
