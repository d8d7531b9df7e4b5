"""The build decides first and then builds strictly; what it packs is complete."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

import dpkernels
from dpkernels.ops import native

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def setup_py() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dpkernels_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("mode", "compiler", "nvcc", "targets"),
    [
        (None, None, None, ()),
        (None, "c++", None, ("cpu",)),
        (None, "c++", "nvcc", ("cpu", "cuda")),
        (None, None, "nvcc", ()),
        ("auto", "c++", None, ("cpu",)),
        ("off", "c++", "nvcc", ()),
        ("cpu", "c++", "nvcc", ("cpu",)),
        ("cuda", "c++", "nvcc", ("cpu", "cuda")),
    ],
)
def test_decision(setup_py: ModuleType, mode, compiler, nvcc, targets) -> None:
    environ = {} if mode is None else {"DPKERNELS_BUILD": mode}
    assert setup_py.decide(environ, compiler, nvcc) == targets


@pytest.mark.parametrize(
    ("mode", "compiler", "nvcc", "message"),
    [
        ("gpu", "c++", "nvcc", "DPKERNELS_BUILD='gpu': expected one of auto, off, cpu, cuda"),
        ("cpu", None, None, "no C\\+\\+ compiler found"),
        ("cuda", None, "nvcc", "no C\\+\\+ compiler found"),
        ("cuda", "c++", None, "no nvcc found"),
    ],
)
def test_impossible_decisions(setup_py: ModuleType, mode, compiler, nvcc, message) -> None:
    with pytest.raises(ValueError, match=message):
        setup_py.decide({"DPKERNELS_BUILD": mode}, compiler, nvcc)


def executable(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_compilers_are_found_where_they_are(setup_py: ModuleType, tmp_path: Path) -> None:
    """CUDA is decided by nvcc on PATH or under CUDA_HOME, not by torch."""
    nvcc = executable(tmp_path / "cuda" / "bin" / "nvcc")
    compiler = executable(tmp_path / "bin" / "my-c++")
    empty = {"PATH": str(tmp_path / "nothing")}
    assert setup_py.find_nvcc(empty) is None
    assert setup_py.find_compiler(empty) is None
    assert setup_py.find_nvcc({**empty, "CUDA_HOME": str(tmp_path / "cuda")}) == str(nvcc)
    assert setup_py.find_nvcc({"PATH": str(nvcc.parent)}) == str(nvcc)
    assert setup_py.find_compiler({"PATH": str(compiler.parent), "CXX": "my-c++ -m64"}) == str(
        compiler
    )


def run(arguments: list[str], where: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=where,
        env={**os.environ, **environ},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution."""
    target = tmp_path_factory.mktemp("sdist")
    result = run(["-m", "build", "--sdist", "--no-isolation", "--outdir", str(target)], ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    (archive,) = target.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(target, filter="data")
    return target / archive.name.removesuffix(".tar.gz")


def test_sdist_is_complete(source: Path) -> None:
    assert source.name == f"dpkernels-{dpkernels.__version__}"
    for name in ("LICENSE", "CMakeLists.txt", "setup.py", "pyproject.toml", "dpkernels/py.typed"):
        assert (source / name).is_file(), name
    for room in ("csrc", "dpkernels"):
        here = {path.relative_to(ROOT) for path in (ROOT / room).rglob("*") if path.is_file()}
        expected = {path for path in here if path.suffix not in {".so", ".pyc"}}
        packed = {path.relative_to(source) for path in (source / room).rglob("*")}
        assert expected <= packed
        assert not [path for path in packed if path.suffix == ".so"]


def test_pure_python_wheel(source: Path, tmp_path: Path) -> None:
    """Without a native build the wheel fits everywhere, works, and says what is missing."""
    arguments = ["-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path)]
    result = run(arguments, source, DPKERNELS_BUILD="off")
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(site)
    info = run(["-m", "dpkernels", "info"], tmp_path, PYTHONPATH=str(site))
    assert info.returncode == 0, info.stderr
    assert "the cpu extension was not built" in " ".join(info.stdout.split())
    script = "import torch, dpkernels; print(dpkernels.ops.clip_factor(torch.ones(1), 2.0).item())"
    result = run(["-c", script], tmp_path, PYTHONPATH=str(site))
    assert result.stdout.strip() == "1.0", result.stderr


def test_a_build_that_fails_is_an_error(setup_py: ModuleType, source: Path) -> None:
    """Even in automatic mode: a compiler error never becomes a pure-Python package."""
    if setup_py.find_compiler(os.environ) is None:
        pytest.skip("no C++ compiler")
    header = source / "csrc" / "include" / "dpkernels" / "types.h"
    original = header.read_text()
    header.write_text('#error "broken on purpose"\n')
    try:
        result = run(["setup.py", "build_ext", "--inplace"], source, DPKERNELS_BUILD="auto")
    finally:
        header.write_text(original)
    assert result.returncode != 0
    assert "broken on purpose" in result.stdout + result.stderr
    assert not list((source / "dpkernels").glob("*.so"))


def test_an_impossible_mode_ends_with_one_line(source: Path) -> None:
    result = run(["setup.py", "--version"], source, DPKERNELS_BUILD="gpu")
    assert result.returncode != 0
    assert "DPKERNELS_BUILD='gpu': expected one of auto, off, cpu, cuda" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(native.why_not_cpu() is not None, reason="not built")
def test_an_extension_left_behind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "INTERFACE", native.INTERFACE + 1)
    with pytest.raises(RuntimeError, match="built from other sources"):
        native.load.__wrapped__("cpu")


@pytest.mark.skipif(native.why_not_cpu() is not None, reason="not built")
def test_info_names_the_instruction_set_and_every_op() -> None:
    from dpkernels.ops import all_ops

    result = run(["-m", "dpkernels", "info"], ROOT)
    assert result.returncode == 0, result.stderr
    assert f"compiled, {native.load('cpu').instruction_set}" in result.stdout
    assert all(name in result.stdout for name in all_ops())


@pytest.mark.slow
def test_isolated_wheel_has_the_native_code(source: Path, tmp_path: Path) -> None:
    """`python -m build` from the sdist, in an environment of its own (downloads build tools)."""
    arguments = ["-m", "build", "--wheel", "--outdir", str(tmp_path)]
    result = run(arguments, source, DPKERNELS_BUILD="cpu")
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        names = packed.namelist()
        packed.extractall(tmp_path / "site")
    assert any(name.startswith("dpkernels/_cpu.baseline") for name in names)
    assert "py3-none-any" not in wheel.name
    info = run(["-m", "dpkernels", "info"], tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert "compiled, " in info.stdout
