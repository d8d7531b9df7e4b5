"""The commands that a task gets, and the options of its own."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from typer.testing import CliRunner

from dpkernels.study.command_line import _results, command_line
from dpkernels.training.task import Prediction, Setting, Task


class Asked(Exception):
    """Carries the configuration that a command asked for."""


class Config:
    """Stands for a task's configuration: takes any setting."""

    @classmethod
    def preset_values(cls, name: str) -> dict:
        return {"preset": name}

    @classmethod
    def from_dict(cls, values: Mapping) -> Config:
        raise Asked(values)


class Trainer:
    config_class = Config


def task(**changes) -> Task:
    words = {
        "name": "knit",
        "help": "Knit.",
        "trainer": lambda: Trainer,
        "presets": ("plain", "purl"),
        "record": "row",
        "columns": {"length": ("length", ".1f"), "rows": ("rows", "d")},
        "data": "Wool.",
    }
    return Task(**{**words, **changes})


def asked(*arguments: str, **changes) -> dict:
    result = CliRunner().invoke(command_line(task(**changes)), list(arguments))
    assert isinstance(result.exception, Asked), result.output
    return result.exception.args[0]


def test_only_a_task_that_predicts_has_the_command():
    prediction = Prediction("Knit on.", "Old.", "New.", "rows")
    for changes, expected in (({}, False), ({"prediction": prediction}, True)):
        text = CliRunner().invoke(command_line(task(**changes)), ["--help"]).output
        assert ("predict" in text) is expected
        for name in ("train", "evaluate", "report", "attack", "study"):
            assert name in text


def test_options_reach_the_settings_that_they_name():
    found = asked("train", "--steps", "3", "--seed", "4", "--epsilon", "2", "--set", "data.size=5")
    assert found["training"] == {"steps": 3, "seed": 4}
    assert found["privacy"] == {"epsilon": 2.0, "noise_multiplier": None}
    assert found["data"] == {"size": 5}
    assert found["preset"] == "plain"


def test_a_study_starts_from_its_own_preset():
    assert asked("study")["preset"] == "plain"
    assert asked("study", study_preset="purl")["preset"] == "purl"
    assert asked("study", "--preset", "plain", study_preset="purl")["preset"] == "plain"


def test_an_option_of_one_task_is_read_by_that_task():
    own = Setting("colours", "data.colours", "Of the wool.", lambda text: text.split(","))
    assert asked("train", "--colours", "red,blue", settings=[own])["data"]["colours"] == [
        "red",
        "blue",
    ]
    assert "data" not in asked("train", settings=[own])
    text = CliRunner().invoke(command_line(task(settings=[own])), ["train", "--help"]).output
    assert "Of the wool." in text
    refused = CliRunner().invoke(command_line(task()), ["train", "--colours", "red"])
    assert refused.exit_code == 2


@pytest.mark.parametrize("unknown", [None, float("nan")])
def test_figures_that_are_missing_are_dashes(unknown):
    table = _results(task(), {"scarf": {"length": 1.25, "rows": 8}, "hat": {"length": unknown}})
    assert [list(column.cells) for column in table.columns] == [
        ["scarf", "hat"],
        ["1.2", "-"],
        ["8", "-"],
    ]
