"""Other machines: no GPU is said plainly, a failing backend costs its own row, rows are adopted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from bench import __main__ as main
from bench import calls, cases, harness, results, rivals, table, timing, work
from bench.part import Todo
from bench.parts import ops, steps, trace
from tests.bench.support import write


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a test is remembered for a measurement."""
    monkeypatch.setattr(work, "STATE", tmp_path / "state")


def test_a_gpu_that_is_not_there_is_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"device 'cuda': torch .* finds no GPU here"):
        results.usable("cuda")
    with pytest.raises(ValueError, match="device 'nothing'"):
        results.usable("nothing")
    output = tmp_path / "rows.csv"
    found = CliRunner().invoke(main.app, ["--device", "cuda", "--output", str(output)])
    assert found.exit_code == 2
    assert not output.exists()


def test_a_backend_that_fails_has_its_reason_and_the_others_their_times(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "ops.csv"
    honest = ops.one_turn
    turns: list[int] = []

    def turn(function, clock):
        turns.append(1)
        if len(turns) == 3:
            raise NotImplementedError("no such instruction")
        return honest(function, clock)

    monkeypatch.setattr(ops, "one_turn", turn)
    monkeypatch.setattr(ops, "TURNS", 1)
    monkeypatch.setattr(ops, "TURN_SECONDS", 0.0)
    for module in (ops, calls):
        monkeypatch.setattr(module, "PRECISIONS", {"float32": (torch.float32, False)})
    monkeypatch.setattr(ops, "SHRINK", 64)
    arguments = ["ops", "--quick", "--only", "linear_norm_sq", "--output", str(path)]
    found = CliRunner().invoke(main.app, arguments)
    assert found.exit_code == 0
    statuses = [row["status"] for row in table.read(path)]
    assert statuses[0] == "cannot run: no such instruction"
    assert set(statuses[1:]) == {"ok"}
    measured = len(turns)
    found = CliRunner().invoke(main.app, [*arguments, "--show"])
    assert "no such instruction" in found.output
    assert len(turns) == measured


def test_a_lost_gpu_ends_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    def synchronize(device: torch.device) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    timing.require_working(torch.device("cpu"), "a call")
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with pytest.raises(timing.GpuLost, match="a call left the GPU unusable"):
        timing.require_working(torch.device("cuda"), "a call")


def test_without_the_ordinary_step_there_is_nothing_to_compare() -> None:
    def broken(workload: cases.Workload, privacy: rivals.Privacy) -> rivals.Trainer:
        raise RuntimeError("out of memory")

    ordinary = replace(rivals.find(["ours"])[0], prepare=broken)
    case = cases.find(["recommender-b256"], "")[0]
    plan = harness.Plan(memory=False)
    with pytest.raises(RuntimeError, match="the ordinary step cannot run: out of memory"):
        harness.measure(case, [ordinary], torch.device("cpu"), plan, work.SILENT)


def test_a_rival_that_is_named_is_measured_though_it_is_slow(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plans: list[harness.Plan] = []

    def of_cases(wanted, chosen, plan, how) -> Todo:
        plans.append(plan)
        return Todo({}, how)

    monkeypatch.setattr(steps, "of_cases", of_cases)
    output = ["--output", str(tmp_path / "rows.csv")]
    for arguments in (output, ["--rival", "hooks", *output]):
        assert CliRunner().invoke(main.app, arguments).exit_code == 0
    assert [plan.everyone for plan in plans] == [False, True]


def test_rows_of_another_machine_come_beside_ours(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def row(device: str, ratio: float) -> results.Row:
        return results.Row(
            "unet3d-96-b2", "ours", "ok", 2, 3, "bfloat16", "", "1", ratio=ratio, device=device
        )

    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    write(theirs / "steps.csv", [row("NVIDIA H200", 1.02)])
    write(ours / "steps.csv", [row("cpu", 1.1), row("NVIDIA H200", 1.5)])
    monkeypatch.setattr(results, "RESULTS", ours)
    monkeypatch.setattr(main, "_write_reports", lambda: None)
    found = CliRunner().invoke(main.app, ["adopt", str(theirs)])
    assert found.exit_code == 0
    assert [r.ratio for r in results.read(ours / "steps.csv")] == [1.1, 1.02]
    assert not (ours / "trace.csv").exists()
    assert CliRunner().invoke(main.app, ["adopt", str(tmp_path)]).exit_code == 2


def test_a_new_trace_takes_the_place_of_the_former_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def rows(case: str, *names: str) -> list[dict[str, object]]:
        return [
            {"device": "GPU", "case": case, "rival": "ours", "kind": "kernel", "name": name}
            for name in names
        ]

    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    table.replace(ours / "trace.csv", [*rows("a", "one", "two"), *rows("b", "one")], trace.PART.key)
    table.replace(theirs / "trace.csv", rows("a", "two", "three"), trace.PART.key)
    monkeypatch.setattr(results, "RESULTS", ours)
    monkeypatch.setattr(main, "_write_reports", lambda: None)
    assert CliRunner().invoke(main.app, ["adopt", str(theirs)]).exit_code == 0
    found = [(row["case"], row["name"]) for row in table.read(ours / "trace.csv")]
    assert sorted(found) == [("a", "three"), ("a", "two"), ("b", "one")]


def test_the_caller_names_the_commit_where_there_is_no_checkout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(results, "_ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("DPKERNELS_COMMIT", raising=False)
    assert results.commit() == "unknown"
    monkeypatch.setenv("DPKERNELS_COMMIT", "abc1234")
    assert results.commit() == "abc1234"
