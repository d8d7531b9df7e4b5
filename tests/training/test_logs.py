"""metrics.csv and the event files."""

import math

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dpkernels.training.logs import COLUMNS, MetricsLog, read_metrics


def test_rows_are_readable_as_soon_as_they_are_written(tmp_path):
    log = MetricsLog(tmp_path / "metrics.csv", tmp_path / "events")
    log.write({"step": 1, "loss": 0.5, "epsilon": None})
    assert read_metrics(tmp_path / "metrics.csv")["loss"] == [0.5]
    log.write({"step": 2, "loss": 0.25, "epsilon": 1.5})
    log.close()
    columns = read_metrics(tmp_path / "metrics.csv")
    assert tuple(columns) == COLUMNS
    assert columns["step"] == [1, 2]
    assert math.isnan(columns["epsilon"][0])
    assert columns["epsilon"][1] == 1.5
    assert all(map(math.isnan, columns["validation"]))


def test_a_resumed_run_appends_under_the_same_heading(tmp_path):
    for step in (1, 2):
        log = MetricsLog(tmp_path / "metrics.csv", tmp_path / "events")
        log.write({"step": step, "loss": 1.0})
        log.close()
    assert (tmp_path / "metrics.csv").read_text().count("loss") == 1
    assert read_metrics(tmp_path / "metrics.csv")["step"] == [1, 2]


def test_tensorboard_shows_what_the_table_holds(tmp_path):
    log = MetricsLog(tmp_path / "metrics.csv", tmp_path / "events")
    log.write({"step": 3, "loss": 0.5, "validation": None})
    log.close()
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(3, 0.5)]


def test_a_column_that_nobody_knows_is_refused(tmp_path):
    log = MetricsLog(tmp_path / "metrics.csv", tmp_path / "events")
    with pytest.raises(ValueError, match="accuracy"):
        log.write({"step": 1, "accuracy": 1.0})
    log.close()
