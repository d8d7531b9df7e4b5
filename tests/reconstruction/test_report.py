"""The risk report and the two commands."""

from __future__ import annotations

import json
import math

import pytest
import typer
from typer.testing import CliRunner

from dpkernels.accounting import cli as accounting_cli
from dpkernels.accounting import get_epsilon
from dpkernels.reconstruction import cli as risk_cli
from dpkernels.reconstruction import ncc_quantile, rero_bound, risk_report

RUN = {"noise_multiplier": 0.8, "sample_rate": 0.05, "steps": 200, "delta": 1e-5}
RECORD = {"dimension": 4096, "data_norm": 10.0, "data_range": 1.0}


def values(report):
    return {(row.scope, row.quantity): row.value for row in report.rows}


def test_report_states_both_budgets_and_every_bound():
    report = risk_report(**RUN, dataset_size=50, **RECORD)
    found = values(report)
    tight = get_epsilon(**RUN)
    loose = get_epsilon(**RUN, accountant="rdp")
    assert found["whole run", "epsilon, tight accountant"] == tight
    assert found["whole run", "epsilon, Opacus RDP accountant"] == loose
    run = {name: RUN[name] for name in ("noise_multiplier", "sample_rate", "steps")}
    one = {"noise_multiplier": 0.8, "sample_rate": 1.0, "steps": 1}
    for words, adversary in (("worst-case", "worst_case"), ("relaxed", "relaxed")):
        (name,) = {quantity for _, quantity in found if words in quantity}
        for scope, updates in (("whole run", run), ("one update", one)):
            exact = rero_bound(**updates, kappa=0.02, adversary=adversary)
            assert found[scope, name] == pytest.approx(exact, rel=1e-12)
    name = "correlation with the record (NCC)"
    for scope, observations in (("one update", 1), ("whole run, typical record", 10)):
        exact = ncc_quantile(0.05, noise_multiplier=0.8, dimension=4096, observations=observations)
        assert found[scope, name] == pytest.approx(exact)
    assert found["whole run, most exposed record", name] > found["whole run, typical record", name]
    assert {row.kind for row in report.rows} == {"given", "upper bound", "lower bound"}


def test_report_reads_in_plain_words():
    text = risk_report(**RUN, dataset_size=50, **RECORD).to_markdown()
    assert "noise multiplier 0.8" in text
    assert "a budget means nothing without its accountant" in text
    assert "50 candidates" in text
    assert text.count("| whole run |") == 4


def test_report_does_not_claim_what_a_coarse_or_a_blank_picture_contradicts():
    report = risk_report(
        noise_multiplier=0.005, sample_rate=0.01, steps=100, delta=1e-6, dataset_size=100,
        dimension=800_000, data_norm=400.0, data_range=1.0,
    )  # fmt: skip
    rows = {(row.scope, row.quantity): row for row in report.rows}
    fine = rows["one update", "correlation with the record (NCC)"]
    coarse = rows["one update", "correlation with a coarse picture of it, 256 values (NCC)"]
    assert fine.value < 0.3
    assert coarse.value > 0.95
    error = rows["one update", "mean squared error, unbiased reconstruction"]
    assert error.reading.endswith("a blank image errs by 0.2")
    assert "without prior knowledge" in report.reading[-1]


@pytest.mark.parametrize(("delta", "warned"), [(0.02, True), (0.019, False)])
def test_a_delta_that_allows_publishing_a_record_is_pointed_out(delta, warned):
    text = risk_report(**{**RUN, "delta": delta}, dataset_size=50).to_markdown()
    assert ("is not below 1 / 50" in text) == warned


def test_json_is_strict_and_complete():
    report = risk_report(**RUN, dataset_size=50)
    data = json.loads(report.to_json())
    assert data["kappa"] == 0.02
    assert data["history"] == [{"noise_multiplier": 0.8, "sample_rate": 0.05, "steps": 200}]
    assert len(data["rows"]) == len(report.rows)


def test_report_states_nothing_that_it_cannot_prove():
    report = risk_report(**RUN, dataset_size=50)
    (missing,) = [row for row in report.rows if row.value is None]
    assert "dimension" in missing.reading
    no_norm = risk_report(**RUN, dataset_size=50, dimension=4096)
    unproven = [row for row in no_norm.rows if row.value is None]
    assert {row.quantity for row in unproven} == {"mean squared error, unbiased reconstruction"}
    with pytest.raises(ValueError, match=r"noise_multiplier=0\.0"):
        risk_report(**{**RUN, "noise_multiplier": 0.0}, dataset_size=50)
    with pytest.raises(ValueError, match="no risk to report"):
        risk_report(history=[(1.0, 0.0, 10)], delta=1e-5, dataset_size=50)
    with pytest.raises(ValueError, match="dataset_size=1"):
        risk_report(**RUN, dataset_size=1)


def test_history_of_one_phase_is_the_run_itself():
    split = [(0.8, 0.05, 150), (0.8, 0.05, 50)]
    whole = risk_report(**RUN, dataset_size=50, **RECORD)
    assert risk_report(history=split, delta=1e-5, dataset_size=50, **RECORD) == whole


def test_history_that_changed_lies_between_its_extremes():
    mixed, low, high = (
        values(risk_report(history=history, delta=1e-5, dataset_size=50, dimension=64))
        for history in (
            [(0.8, 0.05, 100), (1.6, 0.05, 100)],
            [(1.6, 0.05, 200)],
            [(0.8, 0.05, 200)],
        )
    )
    for key, value in mixed.items():
        if key[0].startswith("whole run") and value is not None:
            assert low[key] < value < high[key]


def test_full_batch_and_huge_budgets_report():
    report = risk_report(
        noise_multiplier=1e-4, sample_rate=1.0, steps=10, delta=1e-6, dataset_size=10, dimension=100
    )
    found = values(report)
    assert found["whole run", "epsilon, tight accountant"] > 1e8
    assert all(math.isfinite(value) for value in found.values() if value is not None)


def test_figure_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    path = risk_report(**RUN, dataset_size=50).plot(tmp_path / "risk.png")
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def invoke():
    app = typer.Typer()
    app.command("account")(accounting_cli.account)
    app.command("risk")(risk_cli.risk)
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


ACCOUNT = ("account", "--sample-rate", "0.01", "--steps", "5000", "--delta", "8e-7")
RISK = ("risk", "--noise-multiplier", "0.8", "--sample-rate", "0.05", "--steps", "200")


def test_account_command(invoke, tmp_path):
    noise = invoke(*ACCOUNT, "--epsilon", "8")
    assert noise.exit_code == 0
    assert float(noise.stdout.split("tight")[1].split()[0]) == pytest.approx(0.7915, rel=1e-3)
    budget = invoke(*ACCOUNT, "--noise-multiplier", "0.79146703", "--accountant", "tight")
    assert float(budget.stdout.split("tight")[1]) == pytest.approx(8, rel=1e-3)
    assert invoke(*ACCOUNT).exit_code == 2
    assert invoke(*ACCOUNT, "--epsilon", "8", "--noise-multiplier", "1").exit_code == 2
    refused = invoke(*ACCOUNT, "--epsilon", "1e16", "--accountant", "tight")
    assert refused.exit_code == 2
    assert "target_epsilon=1e+16" in refused.output
    pytest.importorskip("matplotlib")
    figure = tmp_path / "noise.png"
    drawn = invoke(*ACCOUNT, "--epsilon", "8", "--accountant", "tight", "--plot", str(figure))
    assert drawn.exit_code == 0
    assert figure.stat().st_size > 1000


def test_risk_command(invoke):
    text = invoke(*RISK, "--dataset-size", "50", "--delta", "1e-5", "--dimension", "4096")
    assert text.exit_code == 0
    assert "# Reconstruction risk" in text.stdout
    data = json.loads(invoke(*RISK, "--dataset-size", "50", "--delta", "1e-5", "--json").stdout)
    assert data["delta"] == 1e-5
    bad = invoke(*RISK, "--dataset-size", "50", "--delta", "2")
    assert bad.exit_code == 2
    assert "delta=2.0" in bad.output


@pytest.mark.parametrize("figure", ["missing/risk.png", "risk.unknown"])
def test_a_figure_that_cannot_be_written_is_one_line(invoke, tmp_path, figure):
    pytest.importorskip("matplotlib")
    risk = (*RISK, "--dataset-size", "9", "--delta", "1e-5")
    for command in ((*ACCOUNT, "--epsilon", "8"), risk):
        failed = invoke(*command, "--plot", str(tmp_path / figure))
        assert failed.exit_code == 2
        assert "--plot" in failed.output


@pytest.mark.parametrize("command", ["account", "risk"])
def test_help_says_what_and_how(invoke, command):
    text = invoke(command, "--help").output
    assert "Example" in text
    assert "--plot" in text
