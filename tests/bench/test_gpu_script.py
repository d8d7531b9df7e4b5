"""bench/gpu.sh: whatever its stages do, each ends with a line, an exit code and its files.

The interpreter that the script calls is a stand-in: a shell script that answers by its arguments.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

_BENCH = Path(__file__).resolve().parents[2] / "bench"
_STAGES = {
    "first": ("unpack", "versions", "tiles", "engine", "trace", "ops"),
    "second": ("unpack", "versions", "kernels", "steps", "explain", "rivals"),
}
_ANSWERS = {
    "*EXT_SUFFIX*": "echo .fake.so",
    "*find_spec*": "echo pytest xdist pytest_timeout",
    "* tests/ops/production_tiles": 'echo "== 30 passed in 2.00s =="',
    "*tests/engine/device": 'echo "== 12 passed in 3.00s =="',
    "*tests/ops --ignore*": 'echo "== 99 passed in 4.00s =="',
    "* trace *.csv *": 'echo trace >"$5"',
    "* explain *.csv *": 'echo explain >"$5"',
    "* bench ops *.csv *": 'echo ops >"$5"',
    "* --pass *.csv *": 'echo steps >"$6"',
}
"""What the stand-in does, by a pattern of all its arguments; the first that fits."""


class Machine:
    """A checkout of a few empty files, a stand-in for the interpreter, a folder for results."""

    def __init__(self, folder: Path) -> None:
        self.out = folder / "out"
        self._root = folder / "checkout"
        self._answers = dict(_ANSWERS)
        for name in ("gpu.sh", "gpu-pack.sh"):
            (self._root / "bench").mkdir(parents=True, exist_ok=True)
            shutil.copy2(_BENCH / name, self._root / "bench")
        for name in ("tests/ops/production_tiles/test_it.py", "tests/engine/device/test_it.py"):
            self.write(name)
        self.write("dpkernels/_cuda.fake.so")
        self.write(".gpu/commit", "0123abc")
        self.write("tools/empty")

    def write(self, name: str, text: str = "", mode: int = 0o644) -> Path:
        """Write a file of the checkout."""
        path = self._root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)
        return path

    def remove(self, name: str) -> None:
        """Remove a file or a folder of the checkout."""
        path = self._root / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()

    def answer(self, pattern: str, command: str) -> None:
        """Let the stand-in run another command; patterns that are new come first."""
        if pattern in self._answers:
            self._answers[pattern] = command
        else:
            self._answers = {pattern: command, **self._answers}

    def begin(self, half: str, patience: float = 1.0) -> subprocess.Popen[str]:
        """Start the script."""
        cases = "".join(
            f"{p.replace(' ', chr(92) + ' ')}) {c} ;;\n" for p, c in self._answers.items()
        )
        python = self.write("python", f'#!/bin/bash\ncase "$*" in\n{cases}esac\n', 0o755)
        path = f"{self._root / 'tools'}:{os.environ['PATH']}"
        environ = {
            **{k: v for k, v in os.environ.items() if not k.startswith("DPKERNELS_")},
            "PATH": path,
            "PYTHON": str(python),
            "TRITON_CACHE_DIR": str(self._root / "cache"),
            "TMPDIR": str(self._root),
            "DPKERNELS_GPU_PATIENCE": str(patience),
        }
        return subprocess.Popen(
            [self._root / "bench" / "gpu.sh", half, self.out],
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, half: str, patience: float = 1.0) -> tuple[int, str]:
        """Run the script: its exit code and what it prints."""
        process = self.begin(half, patience)
        printed, _ = process.communicate(timeout=60)
        return process.returncode, printed

    def table(self) -> dict[str, tuple[str, str]]:
        """Exit code and meaning of every stage in summary.txt."""
        text = (self.out / "summary.txt").read_text().partition("\n\n")[0]
        rows = [re.fullmatch(r"(\w+) +(\S+) +\d+ s  (.*)", line) for line in text.splitlines()]
        assert all(rows), text
        return {row[1]: (row[2], row[3]) for row in rows if row}

    def log(self, name: str) -> str:
        """A log from the archive of logs."""
        with tarfile.open(self.out / "logs.tar.gz") as archive:
            file = archive.extractfile(f"logs/{name}.log")
            assert file is not None
            return file.read().decode()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Where every stage ends well."""
    return Machine(tmp_path)


@pytest.mark.parametrize("arguments", [(), ("first",), ("third", "out"), ("first", "out", "more")])
def test_the_script_for_a_gpu_says_how_it_is_used(
    arguments: tuple[str, ...], tmp_path: Path
) -> None:
    done = subprocess.run(
        [_BENCH / "gpu.sh", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "usage: bench/gpu.sh first|second OUT_DIR" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("half", "tables"), [("first", {"trace"}), ("second", {"ops", "steps", "explain"})]
)
def test_every_stage_has_its_line_and_its_files(
    machine: Machine, half: str, tables: set[str]
) -> None:
    status, printed = machine.run(half)
    assert status == 0, printed
    assert tuple(machine.table()) == _STAGES[half]
    assert {code for code, _ in machine.table().values()} == {"0"}
    files = {"summary.txt", "logs.tar.gz", *(f"{name}.csv" for name in tables)}
    assert {path.name for path in machine.out.iterdir()} == files
    assert all((machine.out / f"{name}.csv").read_text().strip() for name in tables)
    if half == "first":
        assert machine.table()["tiles"] == ("0", "ok: 30 passed in 2.00s")
        assert "12 passed" in machine.log("engine")


@pytest.mark.parametrize(
    ("command", "code", "meaning"),
    [
        ('echo "FAILED tests/a.py::test_b - wrong"; echo "== 1 failed in 1.00s =="; exit 1', "1",
         "failed: 1 failed in 1.00s"),
        ("exit 5", "5", "no test was found"),
        ("exit 86", "86", "GPU lost; begun 4 times"),
        ("kill -SEGV $$", "139", "crashed; begun 4 times"),
        ("sleep 60", "124", "over its time"),
        ("trap '' TERM; sleep 60 & sleep 60", "137", "over its time, killed"),
    ],
)  # fmt: skip
def test_a_broken_kernel_costs_its_own_stage(
    machine: Machine, command: str, code: str, meaning: str
) -> None:
    machine.answer("* tests/ops/production_tiles", command)
    status, printed = machine.run("first", patience=0.03 if "sleep" in command else 1.0)
    table = machine.table()
    assert status == 1
    assert table.pop("tiles") == (code, meaning)
    assert tuple(table) == tuple(name for name in _STAGES["first"] if name != "tiles")
    if "sleep" not in command:
        assert {found for found, _ in table.values()} == {"0"}
        assert (machine.out / "trace.csv").is_file()
    if "FAILED" in command:
        assert "FAILED tests/a.py::test_b - wrong" in printed
        assert "FAILED tests/a.py::test_b - wrong" in (machine.out / "summary.txt").read_text()


def test_what_is_missing_costs_its_own_stage(machine: Machine) -> None:
    machine.remove("tests/ops/production_tiles")
    machine.remove("dpkernels/_cuda.fake.so")
    machine.remove(".gpu/commit")
    machine.answer("setup.py *", "echo no nvcc; exit 1")
    status, printed = machine.run("first")
    table = machine.table()
    assert status == 1
    assert table["tiles"] == ("-", "missing: tests/ops/production_tiles")
    assert table["build"] == ("1", "failed")
    assert "no nvcc" in printed
    assert {table[name][0] for name in ("versions", "engine", "trace", "ops")} == {"0"}


def test_without_a_gpu_nothing_else_is_tried(machine: Machine) -> None:
    machine.answer("*bench.rehearsal.versions*", "exit 3")
    status, _ = machine.run("second")
    assert status == 1
    assert list(machine.table().items())[1:] == [("versions", ("3", "failed; torch finds no GPU"))]


def test_a_stage_that_lost_the_gpu_begins_again_and_its_budget_is_what_is_left(
    machine: Machine,
) -> None:
    seen = machine.write("seen")
    machine.answer(
        "*--pass first *",
        f'echo "$@" >>{seen}; [ "$(wc -l <{seen})" -gt 2 ] || exit 86; echo steps >"$6"',
    )
    status, printed = machine.run("second")
    assert status == 0, printed
    assert machine.table()["steps"] == ("0", "ok; begun 3 times")
    assert (machine.out / "steps.csv").is_file()
    calls = [line.split() for line in seen.read_text().splitlines()]
    assert ["--fresh" in call for call in calls] == [True, False, False]
    budgets = [int(call[call.index("--budget") + 1]) for call in calls]
    assert all(0 < budget < 170 for budget in budgets)


def test_time_that_is_used_up_is_said(machine: Machine) -> None:
    machine.answer("* bench ops *.csv *", 'echo ops >"$5"; sleep 60')
    machine.answer("*--pass first *", 'echo steps >"$6"; sleep 60')
    status, _ = machine.run("second", patience=0.01)
    table = machine.table()
    assert status == 1
    assert tuple(table) == _STAGES["second"]
    assert ("-", "no time left") in table.values()
    assert (machine.out / "ops.csv").read_text() == "ops\n"


@pytest.mark.parametrize("there", [True, False])
def test_an_offender_is_run_once_under_compute_sanitizer(machine: Machine, there: bool) -> None:
    test = "tests/ops/production_tiles/test_it.py::test_a[1]"
    machine.answer(
        "* tests/ops/production_tiles",
        f'for _ in 1 2; do echo "{test}" >>"$DPKERNELS_LOST_GPU"; done; exit 1',
    )
    if there:
        machine.write("tools/compute-sanitizer", '#!/bin/bash\necho "= $*"; exit 86\n', 0o755)
    status, _ = machine.run("first")
    assert status == 1
    assert machine.table()["tiles"] == ("1", "failed; GPU lost in 2")
    if there:
        assert machine.table()["sanitizer1"] == ("86", "GPU lost")
        assert machine.log("sanitizer1").rstrip().endswith(test)
        assert "sanitizer2" not in machine.table()
    elif shutil.which("compute-sanitizer") is None:
        assert machine.table()["sanitizer"] == ("-", "missing: compute-sanitizer")


def test_stopped_from_outside_it_keeps_what_is_finished_and_leaves_nothing_running(
    machine: Machine, tmp_path: Path
) -> None:
    started = tmp_path / "started"
    machine.answer("*tests/engine/device", f"sleep 60 & echo $! >{started}.new; "
                   f"mv {started}.new {started}; wait")  # fmt: skip
    process = machine.begin("first")
    end = time.monotonic() + 30
    while not started.exists() and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=30)
    assert process.returncode == 143
    table = machine.table()
    assert table["tiles"] == ("0", "ok: 30 passed in 2.00s")
    assert table["engine"] == ("143", "stopped from outside")
    assert "stopped from outside" in printed.splitlines()[-1]
    status = Path(f"/proc/{started.read_text().strip()}/status")
    assert not status.exists() or "State:\tZ" in status.read_text()


_BROKEN_TILES = """
import os
import time

import pytest
import torch

from dpkernels.ops import triton_support as support

pytestmark = pytest.mark.gpu


def test_launches():
    support.combine(torch.ones(2, 3, 40, device="cuda"), square=True)


def test_raises():
    raise RuntimeError("no such instruction")


def test_loses_the_gpu(request):
    with open(os.environ["DPKERNELS_LOST_GPU"], "a") as file:
        file.write(request.node.nodeid + chr(10))
    os._exit(86)


def test_hangs():
    time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize("half", ["first", "second"])
def test_rehearsal_with_the_real_interpreter(half: str, tmp_path: Path) -> None:
    """Kernels are compiled and launched into nothing; of four tests of tiles three go wrong."""
    for name in ("triton", "xdist", "pytest_timeout"):
        pytest.importorskip(name)
    root, out = tmp_path / "checkout", tmp_path / "out"
    for name in ("dpkernels", "bench"):
        shutil.copytree(_BENCH.parent / name, root / name)
    for name in ("pyproject.toml", "setup.py", "tests/conftest.py", "tests/lost_gpu.py"):
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copy2(_BENCH.parent / name, root / name)
    for folder in ("", "ops", "ops/production_tiles", "engine", "engine/device"):
        (root / "tests" / folder).mkdir(exist_ok=True)
        (root / "tests" / folder / "__init__.py").touch()
    (root / "tests/ops/production_tiles/test_it.py").write_text(_BROKEN_TILES)
    launches = _BROKEN_TILES.partition("def test_raises")[0]
    (root / "tests/engine/device/test_launches.py").write_text(launches)
    environ = {
        **{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        "PYTHON": sys.executable,
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
        "DPKERNELS_COMMIT": "0123abc",
        "DPKERNELS_GPU_REHEARSAL": "1",
        "DPKERNELS_GPU_PATIENCE": "2",
    }
    script = [root / "bench" / "gpu.sh", half, out]
    subprocess.run(script, env=environ, check=False, timeout=1200)
    text = (out / "summary.txt").read_text()
    table = {line.split()[0]: line.split()[1] for line in text.partition("\n\n")[0].splitlines()}
    assert table["versions"] == "0", text
    if half == "second":
        assert {"kernels", "steps", "explain", "rivals"} <= table.keys()
        assert {path.name for path in out.glob("*.csv")} == {
            "ops.csv", "steps.csv", "explain.csv"
        }  # fmt: skip
        return
    assert table["tiles"] == "1", text
    assert "3 failed, 1 passed" in text
    assert "GPU lost in 1" in text
    assert table["engine"] == "0", text
    assert (out / "trace.csv").is_file()
    assert any((tmp_path / "cache").rglob("_combine_kernel.cubin"))
