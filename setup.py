"""Builds the native extensions with CMake. Decide first, then build strictly.

``DPKERNELS_BUILD`` = ``auto`` (default) | ``off`` | ``cpu`` | ``cuda`` decides before anything is
compiled: ``auto`` takes the CPU extension if there is a C++ compiler and the CUDA extension if
there is also an nvcc (on PATH, or under CUDA_HOME or CUDA_PATH). A build that has been decided and
fails is an error, never a silent pure-Python package.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PROGRAM_FOLDERS = {"cmake": "CMAKE_BIN_DIR", "ninja": "BIN_DIR"}
MODES = ("auto", "off", "cpu", "cuda")


def find_compiler(environ: Mapping[str, str]) -> str | None:
    """Path of the C++ compiler that CMake is going to find, or None."""
    names = [environ["CXX"].split()[0]] if environ.get("CXX") else ["c++", "g++", "clang++"]
    return next(
        filter(None, (shutil.which(name, path=environ.get("PATH")) for name in names)), None
    )


def find_nvcc(environ: Mapping[str, str]) -> str | None:
    """Path of nvcc from CUDACXX, PATH, CUDA_HOME or CUDA_PATH, or None."""
    homes = [environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if environ.get(name)]
    search = os.pathsep.join([environ.get("PATH", ""), *(os.path.join(h, "bin") for h in homes)])
    return shutil.which(environ.get("CUDACXX") or "nvcc", path=search)


def decide(environ: Mapping[str, str], compiler: str | None, nvcc: str | None) -> tuple[str, ...]:
    """Which extensions to build: (), ("cpu",) or ("cpu", "cuda").

    Raises:
        ValueError: an unknown mode, or one that needs a compiler that is not there.
    """
    mode = environ.get("DPKERNELS_BUILD", "auto")
    if mode not in MODES:
        raise ValueError(f"DPKERNELS_BUILD={mode!r}: expected one of {', '.join(MODES)}")
    if mode in ("cpu", "cuda") and compiler is None:
        raise ValueError(f"DPKERNELS_BUILD={mode}: no C++ compiler found (set CXX or install one)")
    if mode == "cuda" and nvcc is None:
        raise ValueError("DPKERNELS_BUILD=cuda: no nvcc found (on PATH or under CUDA_HOME)")
    if mode == "off" or compiler is None:
        return ()
    return ("cpu",) if mode == "cpu" or nvcc is None else ("cpu", "cuda")


def program(name: str) -> str:
    """Path of cmake or ninja: from the package of that name if installed, else from PATH."""
    try:
        folder = getattr(importlib.import_module(name), PROGRAM_FOLDERS[name])
    except ImportError:
        folder = None
    found = shutil.which(name, path=folder)
    if found is None:
        raise RuntimeError(f"{name} not found: pip install {name}")
    return found


class CMakeBuild(build_ext):
    """Runs CMake once for all extensions and copies what it made to where setuptools wants it."""

    def run(self) -> None:
        build = ROOT / "build" / f"native-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        libraries = build / "lib"
        shutil.rmtree(libraries, ignore_errors=True)
        subprocess.run([program("cmake"), *self._configuration(build, libraries)], check=True)
        subprocess.run([program("cmake"), "--build", str(build)], check=True)
        self._copy(libraries)

    def get_outputs(self) -> list[str]:
        return sorted(str(path) for path in self._package().glob("_c*.so"))

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def _configuration(self, build: Path, libraries: Path) -> list[str]:
        import pybind11

        targets = [extension.name.rpartition("._")[2] for extension in self.extensions]
        includes = [sysconfig.get_path("include"), pybind11.get_include()]
        options = {
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "CMAKE_MAKE_PROGRAM": program("ninja"),
            "DPKERNELS_CUDA": "ON" if "cuda" in targets else "OFF",
            "DPKERNELS_INCLUDES": ";".join(includes),
            "DPKERNELS_OUTPUT": str(libraries),
            "DPKERNELS_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
        }
        if "cuda" in targets:
            options["CMAKE_CUDA_COMPILER"] = str(find_nvcc(os.environ))
        if os.environ.get("DPKERNELS_CUDA_ARCHITECTURES"):
            options["DPKERNELS_CUDA_ARCHITECTURES"] = os.environ["DPKERNELS_CUDA_ARCHITECTURES"]
        settings = [f"-D{name}={value}" for name, value in options.items()]
        return ["-S", str(ROOT), "-B", str(build), "-G", "Ninja", *settings]

    def _copy(self, libraries: Path) -> None:
        package = self._package()
        package.mkdir(parents=True, exist_ok=True)
        for stale in package.glob("_c*.so"):
            stale.unlink()
        for library in sorted(libraries.iterdir()):
            shutil.copy2(library, package)

    def _package(self) -> Path:
        return (ROOT if self.inplace else Path(self.build_lib)) / "dpkernels"


def main() -> None:
    """Decide, say so, and hand over to setuptools."""
    compiler, nvcc = find_compiler(os.environ), find_nvcc(os.environ)
    try:
        targets = decide(os.environ, compiler, nvcc)
    except ValueError as error:
        sys.exit(f"dpkernels: {error}")
    print(f"dpkernels: builds {' and '.join(targets) or 'no native extension'}", file=sys.stderr)
    extensions = [Extension(f"dpkernels._{target}", sources=[]) for target in targets]
    setup(ext_modules=extensions, cmdclass={"build_ext": CMakeBuild})


if __name__ == "__main__":
    main()
