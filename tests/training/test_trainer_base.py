"""A run's data, network and evaluation, with the smallest task there is."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from dpkernels.training.trainer_base import TrainerBase
from tests.training.toy import FEATURES, ToyTrainer, tiny


def test_the_description_is_what_predicting_and_reporting_need(finished):
    description = json.loads((finished / "data.json").read_text())
    assert description == {
        "root": "drawn",
        "classes": 2,
        "view": [FEATURES],
        "unit": "patient",
        "patients": 8,
        "vectors": 8,
        "notes": ["Vectors were drawn."],
    }


def test_the_network_of_a_run_is_built_without_its_data(finished, monkeypatch):
    def fail(self):
        raise AssertionError("the data were opened")

    monkeypatch.setattr(ToyTrainer, "_open", fail)
    assert ToyTrainer.from_run(finished)._trained_network().out_features == 2


def test_evaluation_shows_every_held_out_record_once(finished, tmp_path):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    (run / "overlays" / "old.png").write_bytes(b"of another evaluation")
    results = ToyTrainer.from_run(run).evaluate()
    assert [r.patient_id for r in results] == json.loads((run / "split.json").read_text())["test"]
    stored = json.loads((run / "metrics.json").read_text())
    assert stored["cases"] == [vars(r) for r in results]
    assert stored["weights"] == "ema"
    assert not list((run / "overlays").iterdir())


def test_validation_is_of_the_validation_patients_alone(tmp_path, monkeypatch):
    seen = []
    measure = ToyTrainer._measure

    def watched(self, network, records, on_progress, *, final):
        seen.append((final, [record.name for record in records]))
        return measure(self, network, records, on_progress, final=final)

    monkeypatch.setattr(ToyTrainer, "_measure", watched)
    changes = {"data": {"validation_share": 0.25}, "training": {"validate_every": 3}}
    ToyTrainer(tiny(changes), tmp_path / "run").fit()
    split = json.loads((tmp_path / "run" / "split.json").read_text())
    assert seen == [(False, split["validation"]), (True, split["test"])]


def test_the_embedded_data_lie_beside_the_run(tmp_path):
    @dataclass(frozen=True)
    class Made:
        squares: int = 3
        size: int = 8
        seed: int = 1

    def write(folder, *, squares, size, seed, on_progress):
        folder.mkdir()
        (folder / "made.txt").write_text(f"{squares} {size} {seed}")
        return folder

    folder = ToyTrainer(tiny(), tmp_path / "run")._embedded("square", Made(), write)
    assert folder == tmp_path / "square-3x8-seed1"
    assert (folder / "made.txt").read_text() == "3 8 1"


def test_a_task_without_predictions_says_so(finished):
    assert ToyTrainer.predict is TrainerBase.predict
    with pytest.raises(NotImplementedError):
        ToyTrainer.from_run(finished).predict("in", "out")
