"""The build decides first and then builds strictly; what it packs is complete."""

from __future__ import annotations

import importlib.util
import os
import sys
import types
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import setuptools

import dpkernels
from dpkernels.ops import native
from tests.packaging.conftest import (
    COMPLAINT,
    ROOT,
    broken_compiler,
    executable,
    fail,
    succeed,
    without_compilers,
)


@pytest.fixture(scope="module")
def setup_py() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dpkernels_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def machine(tmp_path: Path):
    """The environment of a machine that has these programs, and nothing else on PATH."""

    def make(*programs: str, mode: str | None = None, **environ: str) -> dict[str, str]:
        (tmp_path / "bin").mkdir(exist_ok=True)
        for name in programs:
            executable(tmp_path / "bin" / name)
        mode_of = {} if mode is None else {"DPKERNELS_BUILD": mode}
        return {"PATH": str(tmp_path / "bin"), **mode_of, **environ}

    return make


@pytest.mark.parametrize(
    ("mode", "programs", "targets"),
    [
        (None, [], ()),
        (None, ["c++"], ("cpu",)),
        (None, ["c++", "nvcc"], ("cpu", "cuda")),
        ("", ["clang++"], ("cpu",)),
        ("auto", ["g++"], ("cpu",)),
        ("off", ["c++", "nvcc"], ()),
        ("off", ["nvcc"], ()),
        ("cpu", ["c++", "nvcc"], ("cpu",)),
        ("cuda", ["c++", "nvcc"], ("cpu", "cuda")),
    ],
)
def test_decision(setup_py: ModuleType, machine, mode, programs, targets) -> None:
    assert setup_py.decide(machine(*programs, mode=mode)) == targets


@pytest.mark.parametrize(
    ("mode", "programs", "environ", "message", "remedy"),
    [
        ("gpu", [], {}, "DPKERNELS_BUILD='gpu'", "expected one of auto, off, cpu, cuda"),
        ("cpu", [], {}, "DPKERNELS_BUILD=cpu, but no C++ compiler", "install one with C++17"),
        ("cuda", ["nvcc"], {}, "DPKERNELS_BUILD=cuda, but no C++ compiler", "or set CXX"),
        ("cuda", ["c++"], {}, "DPKERNELS_BUILD=cuda, but no nvcc", "DPKERNELS_BUILD=cpu leaves"),
        (None, ["nvcc"], {}, "nvcc is there, but no C++ compiler", "DPKERNELS_BUILD=off installs"),
        (
            None,
            ["c++"],
            {"CXX": "cxx -m64"},
            "CXX='cxx -m64': there is no program 'cxx'",
            "unset CXX",
        ),
        (None, ["c++"], {"CXX": " "}, "CXX=' ': there is no program ''", "unset CXX"),
        (None, ["c++"], {"CXX": "'c++"}, 'there is no program "\'c++"', "unset CXX"),
        ("cuda", ["c++"], {"CUDACXX": "nv"}, "CUDACXX='nv': there is no", "unset CUDACXX"),
    ],
)
def test_impossible_decisions(
    setup_py: ModuleType, machine, mode, programs, environ, message, remedy
) -> None:
    with pytest.raises(ValueError) as refused:
        setup_py.decide(machine(*programs, mode=mode, **environ))
    assert message in str(refused.value)
    assert remedy in str(refused.value)
    assert "\n" not in str(refused.value)


def test_compilers_are_found_where_they_are(setup_py: ModuleType, machine, tmp_path: Path) -> None:
    """CUDA is decided by nvcc on PATH or under CUDA_HOME, not by torch."""
    nvcc = executable(tmp_path / "cuda" / "bin" / "nvcc")
    compiler = executable(tmp_path / "compilers" / "my-c++")
    nothing = machine()
    assert setup_py.find_nvcc(nothing) is None
    assert setup_py.find_compiler(nothing) is None
    assert setup_py.find_nvcc({**nothing, "CUDA_HOME": str(tmp_path / "cuda")}) == str(nvcc)
    assert setup_py.find_nvcc({"PATH": str(nvcc.parent)}) == str(nvcc)
    on_path = {"PATH": str(compiler.parent), "CXX": "my-c++ -m64"}
    assert setup_py.find_compiler(on_path) == str(compiler)
    spaced = executable(tmp_path / "my compilers" / "c++")
    for named in (str(spaced), f"'{spaced}' -m64"):
        assert setup_py.find_compiler({**nothing, "CXX": named}) == str(spaced)


@pytest.mark.parametrize(
    ("environ", "called"),
    [
        ({}, None),
        ({"CXX": "g++"}, "g++"),
        ({"CXX": "g++ -m64"}, None),
        ({"CXX": "ccache g++"}, None),
        ({"CXX": "g++", "CUDAHOSTCXX": "clang++"}, None),
        ({"CXX": "g++", "NVCC_CCBIN": "clang++"}, None),
        ({"CXX": "g++", "NVCC_PREPEND_FLAGS": "-ccbin clang++"}, None),
        ({"CXX": "g++", "CUDACXX": "nvcc --compiler-bindir=clang++"}, None),
        ({"CXX": "g++", "CUDAFLAGS": "-lineinfo"}, "g++"),
    ],
)
def test_nvcc_calls_the_compiler_of_cxx(setup_py: ModuleType, machine, environ, called) -> None:
    machine = machine("g++", "clang++", "ccache", "nvcc", **environ)
    host = setup_py.host_compiler(machine)
    assert host == ({"CUDAHOSTCXX": f"{machine['PATH']}/{called}"} if called else {})


class CMake:
    """Stands for CMake in :class:`setup.CMakeBuild`, and remembers what it is asked."""

    def __init__(self, setup_py: ModuleType, patch: pytest.MonkeyPatch, root: Path):
        self.build = setup_py.CMakeBuild(setuptools.Distribution())
        self.build.debug = False
        patch.setattr(setup_py, "ROOT", root)
        patch.setattr(setup_py.subprocess, "run", self.run)

    def run(self, command: list[str], env: dict[str, str], check: bool) -> None:
        if "-S" not in command:
            return
        self.folder = Path(command[command.index("-B") + 1])
        (self.folder / "lib").mkdir(parents=True)
        pairs = [word[2:].split("=", 1) for word in command if word.startswith("-D")]
        self.options, self.environ = dict(pairs), env

    def configure(self, *targets: str) -> Path:
        self.build._compile(targets)
        return self.folder


def test_what_cmake_is_asked(
    setup_py: ModuleType, machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What CMake keeps from its first call decides which folder it gets."""
    environ = machine("g++", "c++", "nvcc")
    for name in (*setup_py.REMEMBERED, "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", environ["PATH"] + os.pathsep + os.environ["PATH"])
    cmake = CMake(setup_py, monkeypatch, tmp_path / "source")
    folders = [cmake.configure("cpu")]
    assert cmake.options["DPKERNELS_CUDA"] == "OFF"
    assert "CMAKE_CUDA_COMPILER" not in cmake.options
    assert cmake.configure("cpu") == folders[0]
    folders.append(cmake.configure("cpu", "cuda"))
    assert cmake.options["DPKERNELS_CUDA"] == "ON"
    assert cmake.options["CMAKE_CUDA_COMPILER"] == f"{environ['PATH']}/nvcc"
    assert "CUDAHOSTCXX" not in cmake.environ
    monkeypatch.setenv("CXX", "g++")
    folders.append(cmake.configure("cpu", "cuda"))
    assert cmake.environ["CUDAHOSTCXX"] == f"{environ['PATH']}/g++"
    monkeypatch.setenv("CUDACXX", "nvcc -lineinfo")
    folders.append(cmake.configure("cpu", "cuda"))
    assert "CMAKE_CUDA_COMPILER" not in cmake.options
    monkeypatch.setenv("DPKERNELS_CUDA_ARCHITECTURES", "90-real")
    folders.append(cmake.configure("cpu", "cuda"))
    assert cmake.options["DPKERNELS_CUDA_ARCHITECTURES"] == "90-real"
    monkeypatch.setattr(setup_py, "ROOT", tmp_path / "copy")
    folders.append(cmake.configure("cpu", "cuda"))
    assert len(set(folders)) == len(folders)
    assert {folder.parent.parent.name for folder in folders} == {"source", "copy"}


def test_cmake_and_ninja_come_from_their_packages_or_from_path(
    setup_py: ModuleType, machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Inside pip's build isolation the package of ninja 1.13 names "" as its folder."""
    environ = machine("ninja")
    on_path = str(tmp_path / "bin" / "ninja")
    packaged = executable(tmp_path / "package" / "ninja")
    for folder, found in (("", on_path), (str(packaged.parent), str(packaged))):
        monkeypatch.setitem(sys.modules, "ninja", types.SimpleNamespace(BIN_DIR=folder))
        assert setup_py.find_program("ninja", environ) == found
    monkeypatch.setitem(sys.modules, "ninja", types.SimpleNamespace())  # a folder of that name
    assert setup_py.find_program("ninja", environ) == on_path
    monkeypatch.setitem(sys.modules, "ninja", None)
    assert setup_py.find_program("ninja", environ) == on_path
    with pytest.raises(ValueError, match="ninja not found: pip install ninja"):
        setup_py.find_program("ninja", {"PATH": str(tmp_path)})


def test_a_python_without_headers_is_told_what_to_install(
    setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(setup_py.sysconfig, "get_path", lambda name: str(tmp_path / name))
    with pytest.raises(ValueError, match=r"no Python\.h in .*include.*-dev, .*DPKERNELS_BUILD=off"):
        setup_py.find_includes()


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
    (source / "build" / "lib" / "dpkernels").mkdir(parents=True)
    (source / "build" / "lib" / "dpkernels" / "of_an_earlier_version.py").touch()
    (source / "dpkernels" / "_cpu.baseline.so").touch()
    arguments = ["-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path]
    succeed(arguments, source, DPKERNELS_BUILD="off")
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(site)
    assert not [*site.rglob("of_an_earlier_version.py"), *site.rglob("*.so")]
    info = succeed(["-m", "dpkernels", "info"], tmp_path, PYTHONPATH=str(site))
    assert "the cpu extension was not built" in " ".join(info.split())
    script = "import torch, dpkernels; print(dpkernels.ops.clip_factor(torch.ones(1), 2.0).item())"
    assert succeed(["-c", script], tmp_path, PYTHONPATH=str(site)).strip() == "1.0"


def test_an_in_place_build_without_a_compiler_builds_nothing(source: Path, tmp_path: Path) -> None:
    """`make test` and `make demo` on a machine without one; no old extension is left behind."""
    left_behind = source / "dpkernels" / "_cpu.baseline.so"
    left_behind.touch()
    arguments = ["setup.py", "build_ext", "--inplace"]
    succeed(arguments, source, **without_compilers(tmp_path))
    assert not left_behind.exists()


def test_a_build_that_fails_is_an_error(setup_py: ModuleType, source: Path) -> None:
    """Even in automatic mode: a compiler error never becomes a pure-Python package."""
    if setup_py.find_compiler(os.environ) is None:
        pytest.skip("no C++ compiler")
    (source / "csrc/include/dpkernels/types.h").write_text('#error "broken on purpose"\n')
    printed = fail(["setup.py", "build_ext", "--inplace"], source, DPKERNELS_BUILD="auto")
    assert "broken on purpose" in printed
    assert_ends_with_remedy(printed)
    assert not list((source / "dpkernels").glob("*.so"))


def assert_ends_with_remedy(printed: str) -> None:
    last = printed.strip().splitlines()[-1]
    assert last.startswith("dpkernels: the native build failed; the reason stands above.")
    assert "CXX chooses another" in last
    assert "if it is cmake or ninja: pip install cmake ninja" in last
    assert "DPKERNELS_BUILD=off installs without compiling" in last


def test_a_compiler_that_fails_is_an_error(source: Path, tmp_path: Path) -> None:
    arguments = ["setup.py", "build_ext", "--inplace"]
    broken = str(broken_compiler(tmp_path))
    printed = fail(arguments, source, DPKERNELS_BUILD="cpu", CXX=broken)
    assert COMPLAINT in printed
    assert_ends_with_remedy(printed)


def test_an_impossible_mode_ends_with_one_line(source: Path) -> None:
    arguments = ["setup.py", "--quiet", "build_ext", "--inplace"]
    printed = fail(arguments, source, DPKERNELS_BUILD="gpu")
    expected = "dpkernels: DPKERNELS_BUILD='gpu': expected one of auto, off, cpu, cuda"
    assert printed.strip() == expected
    assert succeed(["setup.py", "--version"], source, DPKERNELS_BUILD="gpu").strip()


def test_a_build_into_the_source_keeps_the_source(source: Path) -> None:
    succeed(["setup.py", "build", "--build-lib", "."], source, DPKERNELS_BUILD="off")
    assert (source / "dpkernels" / "__init__.py").is_file()


@pytest.mark.parametrize("script", ["\0garbage", None])
def test_a_cmake_that_does_not_run_ends_with_one_line(
    setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str | None
) -> None:
    program = executable(tmp_path / "cmake")
    program.write_text(script if script else "#!/no/such/interpreter\n")
    monkeypatch.setattr(setup_py, "find_program", lambda name, environ: str(program))
    monkeypatch.setattr(setup_py, "ROOT", tmp_path)
    monkeypatch.setenv("DPKERNELS_BUILD", "cpu")
    monkeypatch.setenv("CXX", str(executable(tmp_path / "c++")))
    build = setup_py.CMakeBuild(setuptools.Distribution())
    build.debug = False
    with pytest.raises(SystemExit, match="dpkernels: .*cmake.*: pip install cmake; DPKERNELS_BUI"):
        build.run()


@pytest.mark.skipif(native.why_not_cpu() is not None, reason="not built")
def test_an_extension_left_behind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "INTERFACE", native.INTERFACE + 1)
    with pytest.raises(RuntimeError, match="built from other sources"):
        native.load.__wrapped__("cpu")


@pytest.mark.skipif(native.why_not_cpu() is not None, reason="not built")
def test_info_names_the_instruction_set_and_every_op() -> None:
    from dpkernels.ops import all_ops

    printed = succeed(["-m", "dpkernels", "info"], ROOT)
    assert f"compiled, {native.load('cpu').instruction_set}" in printed
    assert all(name in printed for name in all_ops())


def test_version_is_printed() -> None:
    printed = succeed(["-m", "dpkernels", "--version"], ROOT)
    assert printed == f"dpkernels {dpkernels.__version__}\n"
