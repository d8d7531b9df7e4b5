"""A process that ends in the middle: the run that goes on leaves out what did it, and only that."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import calls, harness, results, rivals, table, timing, work
from bench.part import How
from bench.parts import ops, steps
from tests.bench.support import TINY

_KILLED = "ended the process (exit status unknown): not tried again"


def _run(folder: Path, target: Callable[..., None], *arguments: object) -> int:
    """Exit code of a process that runs `target` with `folder`, its memory in a folder below."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.memory"])
    process = context.Process(target=_in_process, args=(folder, target, *arguments))
    process.start()
    process.join(120.0)
    process.kill()
    assert process.exitcode is not None
    return process.exitcode


def _in_process(folder: Path, target: Callable[..., None], *arguments: object) -> None:
    said = os.open(folder / "said", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.environ["DPKERNELS_COMMIT"] = "same"
    work.STATE = folder / "state"
    target(folder, *arguments)


def _items(folder: Path, ending: str, limit: float | None = None) -> None:
    """Three items, of which the second begins three pieces and ends in its second one."""

    def note(text: str) -> None:
        with (folder / "log").open("a") as file:
            file.write(f"{text}\n")

    def a(report: work.Report) -> None:
        note("a")

    def b(report: work.Report) -> None:
        for piece in ("one", "two", "three"):
            if piece in report.ended:
                note(f"b without {piece}: {report.ended[piece]}")
                continue
            report.begin(piece)
            note(f"b {piece}")
            if piece == "two":
                _end(ending)

    def c(report: work.Report) -> None:
        note("c")
        if ending == "kill in c":
            _end("kill")

    outcome = work.off(
        {"a": a, "b": b, "c": c},
        "part",
        {},
        piece_seconds=limit,
        fresh=ending == "fresh",
        lost=lambda item, status: note(f"no {item}: {status}"),
    )
    (folder / "outcome").write_text(json.dumps([outcome.failed, outcome.left, outcome.ended]))


def _end(how: str) -> None:
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "stop":
        os.kill(os.getpid(), signal.SIGTERM)
    if how in ("stop", "hang"):
        time.sleep(60.0)
    if how == "lose":
        raise timing.GpuLost("an illegal memory access")


def _steps(folder: Path, killing: str) -> None:
    """A case of which one rival ends the process."""
    chosen = [
        replace(r, prepare=lambda workload, privacy: _end("kill")) if r.name == killing else r
        for r in rivals.find(["ours", "loop"])
    ]
    plan = harness.Plan(0.0, None, 1, 1, memory=False)
    steps.PART.run(steps.of_cases([TINY], chosen, plan, How(folder / "rows.csv")))


def _ops(folder: Path, last: int) -> None:
    """The bench of an op, which ends the process in its turn of this number."""
    honest, turns = ops.one_turn, []

    def turn(function: Callable[[], object], clock: timing.Clock) -> list[float]:
        turns.append(1)
        if len(turns) == last:
            _end("kill")
        return honest(function, clock)

    ops.one_turn, ops.TURN_SECONDS, ops.TURNS, ops.SHRINK = turn, 0.0, 1, 64
    ops.PRECISIONS = calls.PRECISIONS = {"float32": (torch.float32, False)}
    how = How(folder / "ops.csv")
    raise SystemExit(
        0 if ops.PART.run(ops.todo(how, only="linear_norm_sq", quick=True)).complete else 1
    )


def _log(folder: Path) -> list[str]:
    return (folder / "log").read_text().splitlines()


def _outcome(folder: Path) -> list[list[str]]:
    """Items that failed, that are left, and what ended a process."""
    return json.loads((folder / "outcome").read_text())


@pytest.mark.parametrize(
    ("ending", "code", "reason"),
    [
        ("kill", -signal.SIGKILL, "exit status unknown"),
        ("lose", work.GPU_LOST, "an illegal memory access"),
        ("hang", work.HUNG, "no end within 0.5 s"),
    ],
)
def test_what_ends_the_process_is_left_out_and_the_rest_is_measured(
    tmp_path: Path, ending: str, code: int, reason: str
) -> None:
    assert _run(tmp_path, _items, ending, 0.5 if ending == "hang" else None) == code
    assert _log(tmp_path) == ["a", "b one", "b two"]
    if ending == "hang":
        assert "in _end" in (tmp_path / "said").read_text()  # the stack says where it waits
    assert _run(tmp_path, _items, "nothing") == 0
    assert _outcome(tmp_path) == [[], [], ["b: two"]]
    status = f"ended the process ({reason}): not tried again"
    assert f"b: two: {status}" in (tmp_path / "said").read_text()
    assert _log(tmp_path)[3:] == ["b one", f"b without two: {status}", "b three", "c"]


def test_an_item_that_had_begun_no_piece_is_left_out_as_a_whole(tmp_path: Path) -> None:
    assert _run(tmp_path, _items, "kill in c") == -signal.SIGKILL
    assert _run(tmp_path, _items, "nothing") == 0
    assert _outcome(tmp_path) == [[], [], ["c"]]
    assert _log(tmp_path)[-1] == f"no c: {_KILLED}"
    assert _run(tmp_path, _items, "fresh") == 0
    assert _outcome(tmp_path) == [[], [], []]
    assert _log(tmp_path)[-5:] == ["a", "b one", "b two", "b three", "c"]


def test_a_process_that_is_asked_to_stop_blames_nothing(tmp_path: Path) -> None:
    assert _run(tmp_path, _items, "stop") == 128 + signal.SIGTERM
    assert _run(tmp_path, _items, "nothing") == 0
    assert _outcome(tmp_path) == [[], [], []]
    assert _log(tmp_path) == ["a", "b one", "b two", "b one", "b two", "b three", "c"]


def test_an_error_that_leaves_the_gpu_lost_ends_the_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(work, "STATE", tmp_path)
    failures: list[str] = []

    def lost(device: object, after: str) -> None:
        raise timing.GpuLost(after)

    def item(report: work.Report) -> None:
        report.begin("kernel")
        failures.append("item")
        raise RuntimeError("an illegal memory access was encountered")

    work.off({"a": item, "b": item}, "part", {})
    assert failures == ["item", "item"]
    monkeypatch.setattr(work.torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(timing, "require_working", lost)
    with pytest.raises(SystemExit) as ended:
        work.off({"a": item, "b": item}, "part", {}, fresh=True)
    assert ended.value.code == work.GPU_LOST
    assert len(failures) == 3
    remembered = work.Memory(tmp_path / "part.json", {}).ended
    assert list(remembered) == ["a"]
    assert "illegal memory access" in remembered["a"]["kernel"]


def test_a_rival_that_ends_the_process_has_that_in_its_row(tmp_path: Path) -> None:
    assert _run(tmp_path, _steps, "ours") == -signal.SIGKILL
    assert _run(tmp_path, _steps, "ours") == 0
    rows = {row.rival: row for row in results.read(tmp_path / "rows.csv")}
    assert {name: row.status for name, row in rows.items()} == {
        "ordinary": "ok",
        "ours": _KILLED,
        "loop": "ok",
    }
    assert rows["loop"].ratio is not None
    assert rows["ours"].ratio is None


def test_a_backend_that_ends_the_process_costs_its_own_rows(tmp_path: Path) -> None:
    # the first two turns find the peaks, then come the backends of the first shape
    assert _run(tmp_path, _ops, 4) == -signal.SIGKILL
    before = table.read(tmp_path / "ops.csv")
    assert [row["status"] for row in before] == ["ok"]
    assert _run(tmp_path, _ops, 0) == 1
    rows = table.read(tmp_path / "ops.csv")
    first, second = rows[:2]
    where = f"not tried: it has ended the process on {second['shape']} {second['precision']}"
    others = [where if row["backend"] == second["backend"] else "ok" for row in rows[2:]]
    assert [row["status"] for row in rows] == ["ok", _KILLED, *others]
    assert where in others, "on other shapes it would end the process again"
    assert "ok" in others
    assert (first["shape"], first["precision"]) == (second["shape"], second["precision"])
    assert first["backend"] != second["backend"]
    assert len({row["shape"] for row in rows}) == 3
