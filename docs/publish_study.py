"""Copy a finished study into docs/study, and its short table into the tutorial.

Run as `python docs/publish_study.py runs/study`, or by `make study-docs`.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

from dpkernels.study.results import budget, to_markdown

DOCS = Path(__file__).resolve().parent
FILES = ("report.html", "table.csv", "table.md", "grid.png", "curves.png", "study.json")
BEGIN, END = "<!-- study:begin -->\n", "<!-- study:end -->"


def short_table(study: dict) -> str:
    """What the tutorial shows: utility with its spread, and how near the attacks come."""
    head = ["epsilon", "noise multiplier", "liver Dice", "NCC imprint", "NCC optimal"]
    body = []
    for row in study["rows"]:
        epsilon = math.inf if row["epsilon"] is None else row["epsilon"]
        spread = "" if row["spread"] is None else f" ± {row['spread']:.3f}"
        body.append(
            [
                budget(epsilon),
                f"{row['noise_multiplier']:.3g}",
                f"{row['utility']:.3f}{spread}",
                f"{row['attacks']['imprint']['ncc']:.3f}",
                f"{row['attacks']['optimal']['ncc']:.3f}",
            ]
        )
    return to_markdown(head, body)


def between_marks(text: str, table: str) -> str:
    """`text` with what lies between the marks replaced."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{table}{END}{after}"


def main(source: Path) -> None:
    """Copy the files and rewrite the table."""
    target = DOCS / "study"
    target.mkdir(exist_ok=True)
    for name in FILES:
        shutil.copy(source / name, target / name)
    tutorial = DOCS / "tutorials" / "segmentation.md"
    study = json.loads((source / "study.json").read_text())
    tutorial.write_text(between_marks(tutorial.read_text(), short_table(study)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
