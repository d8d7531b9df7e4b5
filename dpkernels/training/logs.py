"""What a run records per step: metrics.csv and TensorBoard."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

COLUMNS = (
    "step",
    "loss",
    "epsilon",
    "clipped_fraction",
    "median_norm",
    "patients",
    "learning_rate",
    "seconds",
    "validation",
)


class MetricsLog:
    """One row per step, on disk as soon as it is written.

    Args:
        table: path of metrics.csv; appended to when it exists.
        tensorboard: folder of the event files.
    """

    def __init__(self, table: Path, tensorboard: Path) -> None:
        self._file = table.open("a", newline="")
        self._writer = csv.DictWriter(self._file, COLUMNS)
        self._events = SummaryWriter(str(tensorboard))
        if not self._file.tell():
            self._writer.writeheader()

    def write(self, row: dict[str, Any]) -> None:
        """Append a row; absent and None values stay empty."""
        known = {name: value for name, value in row.items() if value is not None}
        self._writer.writerow(known)
        self._file.flush()
        for name, value in known.items():
            if name != "step":
                self._events.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        self._events.close()


def read_metrics(table: Path) -> dict[str, list[float]]:
    """Columns of metrics.csv; empty cells are NaN."""
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        column: [float(row[column]) if row.get(column) else math.nan for row in rows]
        for column in COLUMNS
    }
