"""`dpkernels classify study`: the machinery of the segmentation study on images."""

from __future__ import annotations

import csv
import json
import math

from dpkernels.classification.trainer import ClassificationTrainer
from dpkernels.study.runner import Study, StudySettings


def test_a_study_of_images(tiny, tmp_path) -> None:
    settings = StudySettings((1.0, 1e12, math.inf), patients=4, adversaries=("imprint", "optimal"))
    report = Study(ClassificationTrainer, tiny(), settings, tmp_path / "study").run()
    with (report.folder / "table.csv").open() as file:
        head, *body = csv.reader(file)
    assert (head, body) == (report.head, report.body)
    assert "MCC" in head
    assert [row.attacks["optimal"].ncc > 0.9 for row in report.rows] == [False, True, True]
    assert [row.attacks["imprint"].ncc > 0.9 for row in report.rows] == [False, True, True]
    page = (report.folder / "report.html").read_text()
    assert "the attacks are given one" in page
    assert "MCC" in report.verdict.sentences[0]
    stored = json.loads((report.folder / "cells/epsilon-1-seed0/study.json").read_text())
    assert stored["dimension"] == 3 * 16 * 16
