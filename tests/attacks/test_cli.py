"""The command `audit`."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from dpkernels.attacks import cli
from dpkernels.cli import app
from tests.attacks.test_one_run_audit import CONFIDENCE, DELTA, without_clipping


def test_the_command_is_registered_as_it_stands() -> None:
    registered = {command.name: command.callback for command in app.registered_commands}
    assert registered["audit"] is cli.audit


def test_the_command_says_what_it_found(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["audit", "--canaries", "500", "--confidence", str(CONFIDENCE)]
    arguments += ["--delta", str(DELTA), "--noise-multiplier", "4"]
    fine = CliRunner().invoke(app, arguments)
    assert fine.exit_code == 0
    assert "No violation found" in fine.output
    without_clipping(monkeypatch)
    broken = CliRunner().invoke(app, arguments)
    assert broken.exit_code == 1
    assert "VIOLATION" in broken.output
    wrong = CliRunner().invoke(app, ["audit", "--steps", "0"])
    assert wrong.exit_code == 2
    assert "steps=0" in wrong.output


def test_secure_mode_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def refuse(**arguments: object) -> None:
        asked.append(arguments["engine"])
        raise ValueError("engine: enough seen")

    monkeypatch.setattr("dpkernels.attacks.one_run_audit.one_run_audit", refuse)
    for flags, expected in (([], False), (["--secure-mode"], True)):
        refused = CliRunner().invoke(app, ["audit", *flags])
        assert refused.exit_code == 2
        assert "engine: enough seen" in refused.output
        assert asked[-1].secure_mode is expected
