"""Builds the native extensions with CMake. Decide first, then build strictly.

``DPKERNELS_BUILD`` = ``auto`` (default) | ``off`` | ``cpu`` | ``cuda`` decides before anything is
compiled: ``auto`` takes the CPU extension if there is a C++ compiler, the CUDA extension if there
is also an nvcc (on PATH, or under CUDA_HOME or CUDA_PATH), and neither where there is no compiler.
Half a toolchain is an error, and so is a build that has been decided and fails: it ends in one line
that names the remedy, never in a silent pure-Python package.
"""

from __future__ import annotations

import importlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PROGRAM_FOLDERS = {"cmake": "CMAKE_BIN_DIR", "ninja": "BIN_DIR"}
MODES = ("auto", "off", "cpu", "cuda")
# What CMake reads when it first sees a folder and keeps: with other values, it gets another folder.
REMEMBERED = ("CXX", "CXXFLAGS", "LDFLAGS", "CUDACXX", "CUDAFLAGS", "CUDAHOSTCXX", "NVCC_CCBIN")
REMEMBERED += ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "DPKERNELS_CUDA_ARCHITECTURES")
WITHOUT = "DPKERNELS_BUILD=off installs without compiling"
WITHOUT_CUDA = "DPKERNELS_BUILD=cpu leaves CUDA out"
INSTALL_COMPILER = "install one with C++17 (Debian: g++, Fedora: gcc-c++), or set CXX"
INSTALL_CUDA = "install the CUDA toolkit, and put nvcc on PATH or set CUDA_HOME"


def find_compiler(environ: Mapping[str, str]) -> str | None:
    """Path of the C++ compiler that CMake is going to use, or None.

    Raises:
        ValueError: CXX names a program that does not exist.
    """
    if environ.get("CXX"):
        return _named("CXX", environ)
    found = (shutil.which(name, path=environ.get("PATH")) for name in ("c++", "g++", "clang++"))
    return next(filter(None, found), None)


def find_nvcc(environ: Mapping[str, str]) -> str | None:
    """Path of nvcc from CUDACXX, PATH, CUDA_HOME or CUDA_PATH, or None.

    Raises:
        ValueError: CUDACXX names a program that does not exist.
    """
    if environ.get("CUDACXX"):
        return _named("CUDACXX", environ)
    homes = [environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if environ.get(name)]
    search = os.pathsep.join([environ.get("PATH", ""), *(os.path.join(h, "bin") for h in homes)])
    return shutil.which("nvcc", path=search)


def _named(variable: str, environ: Mapping[str, str]) -> str:
    """Path of the program that an environment variable names, by itself or with arguments."""
    value, search = environ[variable], environ.get("PATH")
    whole = shutil.which(value, path=search)
    if whole is not None:
        return whole
    program = (_words(value) or [""])[0]
    found = shutil.which(program, path=search)
    if found is None:
        raise ValueError(
            f"{variable}={value!r}: there is no program {program!r}; correct it or unset {variable}"
        )
    return found


def _words(value: str) -> list[str]:
    try:
        return shlex.split(value)
    except ValueError:  # a quotation mark without its twin
        return value.split()


def host_compiler(environ: Mapping[str, str]) -> dict[str, str]:
    """What to add to the environment of CMake for nvcc to call CXX; by itself it calls gcc.

    Nothing where the user names the compiler that nvcc is to call, or where CXX has arguments.
    """
    compiler = shutil.which(environ.get("CXX") or "", path=environ.get("PATH"))
    flags = " ".join(
        environ.get(name, "")
        for name in ("CUDACXX", "CUDAFLAGS", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")
    )
    said = environ.get("CUDAHOSTCXX") or environ.get("NVCC_CCBIN")
    if compiler is None or said or "-ccbin" in flags or "-compiler-bindir" in flags:
        return {}
    return {"CUDAHOSTCXX": compiler}


def decide(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Which extensions to build: (), ("cpu",) or ("cpu", "cuda").

    Raises:
        ValueError: an unknown mode, one whose compiler is not there, or an nvcc without the C++
            compiler that it calls.
    """
    mode = environ.get("DPKERNELS_BUILD") or "auto"
    if mode not in MODES:
        raise ValueError(f"DPKERNELS_BUILD={mode!r}: expected one of {', '.join(MODES)}")
    if mode == "off":
        return ()
    compiler = find_compiler(environ)
    nvcc = find_nvcc(environ) if mode != "cpu" else None
    if mode == "cuda" and nvcc is None:
        raise ValueError(f"DPKERNELS_BUILD=cuda, but no nvcc: {INSTALL_CUDA}; {WITHOUT_CUDA}")
    if compiler is None and (mode != "auto" or nvcc is not None):
        asked = f"DPKERNELS_BUILD={mode}" if mode != "auto" else f"{nvcc} is there"
        raise ValueError(f"{asked}, but no C++ compiler: {INSTALL_COMPILER}; {WITHOUT}")
    if compiler is None:
        return ()
    return ("cpu",) if nvcc is None else ("cpu", "cuda")


def find_program(name: str, environ: Mapping[str, str]) -> str:
    """Path of cmake or ninja: from the package of that name, else from PATH.

    Inside pip's build isolation the ninja package knows no folder (its BIN_DIR is ""), but pip has
    put its program on PATH.

    Raises:
        ValueError: the program is in neither place.
    """
    try:
        folder = getattr(importlib.import_module(name), PROGRAM_FOLDERS[name], "")
    except ImportError:
        folder = ""
    # An empty path would make shutil.which look nowhere.
    found = shutil.which(name, path=folder) if folder else None
    found = found or shutil.which(name, path=environ.get("PATH"))
    if found is None:
        raise ValueError(f"{name} not found: pip install {name}; {WITHOUT}")
    return found


def find_includes() -> list[str]:
    """The folders of the headers of Python and of pybind11.

    Raises:
        ValueError: one is not installed; on Debian, Python's are a package of their own.
    """
    python = Path(sysconfig.get_path("include"))
    if not (python / "Python.h").is_file():
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise ValueError(
            f"a C++ compiler is there, but no Python.h in {python}: install Python's headers "
            f"(Debian: python{version}-dev, Fedora: python3-devel); {WITHOUT}"
        )
    try:
        import pybind11
    except ImportError:
        raise ValueError(f"pybind11 not found: pip install pybind11; {WITHOUT}") from None
    return [str(python), pybind11.get_include()]


def give_up(reason: object) -> NoReturn:
    """End the build with one line, without a traceback."""
    sys.exit(f"dpkernels: {reason}")


class FreshBuild(build):
    """Packs what the source holds now, not modules that an earlier build has left behind."""

    def run(self) -> None:
        package = Path(self.build_lib).resolve() / "dpkernels"
        if package.is_dir() and package != ROOT / "dpkernels":
            shutil.rmtree(package)
        super().run()


class CMakeBuild(build_ext):
    """Runs CMake once for all extensions and copies what it made to where setuptools wants it."""

    def run(self) -> None:
        try:
            targets = decide(os.environ)
            libraries = self._compile(targets) if targets else []
        except ValueError as error:
            give_up(error)
        for stale in self._package().glob("_c*.so"):
            stale.unlink()
        for library in libraries:
            self._package().mkdir(parents=True, exist_ok=True)
            shutil.copy2(library, self._package())

    def get_outputs(self) -> list[str]:
        return sorted(str(path) for path in self._package().glob("_c*.so"))

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def _compile(self, targets: tuple[str, ...]) -> list[Path]:
        """The extensions, compiled.

        Raises:
            ValueError: something that is needed is not there, or the build fails.
        """
        nvcc = find_nvcc(os.environ) if "cuda" in targets else None
        cmake, folder = find_program("cmake", os.environ), self._folder(nvcc)
        libraries = folder / "lib"
        shutil.rmtree(libraries, ignore_errors=True)
        settings = [f"-D{k}={v}" for k, v in self._options(nvcc, libraries).items()]
        environ = {**os.environ, **host_compiler(os.environ)}
        for command in (
            [cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *settings],
            [cmake, "--build", str(folder)],
        ):
            try:
                subprocess.run(command, check=True, env=environ)
            except OSError as error:
                raise ValueError(f"{error}: pip install cmake; {WITHOUT}") from error
            except subprocess.CalledProcessError as error:
                cuda = f"CUDAHOSTCXX the one that nvcc calls; {WITHOUT_CUDA}; "
                raise ValueError(
                    "the native build failed; the reason stands above. If it is the compiler: CXX "
                    f"chooses another; {cuda if nvcc else ''}if it is cmake or ninja: "
                    f"pip install cmake ninja; {WITHOUT}"
                ) from error
        return sorted(libraries.iterdir())

    def _folder(self, nvcc: str | None) -> Path:
        """Where CMake builds: a folder for each Python, source and choice of compilers."""
        compilers = find_compiler(os.environ), nvcc
        remembered = repr((ROOT, *compilers, *map(os.environ.get, REMEMBERED))).encode()
        python = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        return ROOT / "build" / f"native-{python}-{zlib.crc32(remembered):08x}"

    def _options(self, nvcc: str | None, libraries: Path) -> dict[str, str]:
        """The options of CMakeLists.txt."""
        options = {
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "CMAKE_MAKE_PROGRAM": find_program("ninja", os.environ),
            "DPKERNELS_CUDA": "ON" if nvcc else "OFF",
            "DPKERNELS_INCLUDES": ";".join(find_includes()),
            "DPKERNELS_OUTPUT": str(libraries),
            "DPKERNELS_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
        }
        if nvcc and not os.environ.get("CUDACXX"):  # which CMake reads by itself
            options["CMAKE_CUDA_COMPILER"] = nvcc
        if os.environ.get("DPKERNELS_CUDA_ARCHITECTURES"):
            options["DPKERNELS_CUDA_ARCHITECTURES"] = os.environ["DPKERNELS_CUDA_ARCHITECTURES"]
        return options

    def _package(self) -> Path:
        return (ROOT if self.inplace else Path(self.build_lib)) / "dpkernels"


def main() -> None:
    """Decide, say so, and hand over to setuptools."""
    try:
        targets = decide(os.environ)
    except ValueError:
        targets = ("cpu",)  # whoever builds is told why; a source archive needs no compiler
    else:
        print(f"dpkernels: builds {' and '.join(targets) or 'no native code'}", file=sys.stderr)
    extensions = [Extension(f"dpkernels._{target}", sources=[]) for target in targets]
    setup(ext_modules=extensions, cmdclass={"build": FreshBuild, "build_ext": CMakeBuild})


if __name__ == "__main__":
    main()
