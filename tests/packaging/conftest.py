"""What the tests of build and installation share: programs that are run, and the packed source."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPLAINT = "this compiler has no licence"


def run(
    arguments: list[str | Path], where: Path, python: str | Path = sys.executable, **environ: str
) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder, with an environment of its own where `environ` says so."""
    return subprocess.run(
        [python, *arguments],
        cwd=where,
        env={**os.environ, **environ},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=900,
    )


def succeed(*arguments, **keywords) -> str:
    """What a run prints to its output; it has to succeed."""
    result = run(*arguments, **keywords)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def fail(*arguments, **keywords) -> str:
    """Everything that a run prints; it has to fail, without a traceback."""
    result = run(*arguments, **keywords)
    printed = result.stdout + result.stderr
    assert result.returncode != 0, printed
    assert "Traceback" not in printed
    return printed


def executable(path: Path, script: str = "") -> Path:
    """A program that runs a shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def broken_compiler(folder: Path) -> Path:
    """A C++ compiler that does nothing but complain."""
    return executable(folder / "broken-c++", f"echo {COMPLAINT} >&2; exit 1")


def without_compilers(folder: Path) -> dict[str, str]:
    """The environment of a machine that has no compiler and says nothing of a build."""
    (folder / "nothing").mkdir()
    unset = ("CXX", "CUDACXX", "CUDA_HOME", "CUDA_PATH", "DPKERNELS_BUILD")
    return {"PATH": str(folder / "nothing"), **dict.fromkeys(unset, "")}


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution."""
    target = tmp_path_factory.mktemp("sdist")
    succeed(["-m", "build", "--sdist", "--no-isolation", "--outdir", target], ROOT)
    (packed,) = target.glob("*.tar.gz")
    return packed


@pytest.fixture
def source(archive: Path, tmp_path: Path) -> Path:
    """The unpacked source distribution, one for each test."""
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path / "source", filter="data")
    return tmp_path / "source" / archive.name.removesuffix(".tar.gz")
