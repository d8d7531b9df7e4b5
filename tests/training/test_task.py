"""A task as data, and the words that its commands get from it."""

from __future__ import annotations

import subprocess
import sys

from dpkernels.training.task import Task

TASK = Task(
    name="knit",
    help="Knit.",
    trainer=lambda: None,
    presets=("plain", "purl", "rib"),
    record="row",
    columns={},
    data="Wool.",
    subjects="rows",
    examples={"train": ("train", "train --out scarf")},
)


def test_the_first_preset_stands_first():
    assert TASK.presets_from("plain") == "plain, purl, rib"
    assert TASK.presets_from("rib") == "rib, plain, purl"


def test_a_command_speaks_of_the_records_of_its_task():
    assert TASK.help_of("evaluate", "Held-out {subjects}: each {record}.") == (
        "Held-out rows: each row."
    )
    assert TASK.help_of("train", "Do it.") == (
        "Do it.\n\nExamples:\n\n  dpkernels knit train\n\n  dpkernels knit train --out scarf"
    )
    assert TASK.patients == "CSV with columns row,patient_id when patients have several rows."


def test_the_command_lines_of_all_tasks_load_no_torch():
    script = (
        "import dpkernels.cli, dpkernels.classification.cli, dpkernels.segmentation.cli, sys; "
        "sys.exit('torch' in sys.modules or 'monai' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
