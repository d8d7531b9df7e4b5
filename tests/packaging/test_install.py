"""Installing as a stranger does: with pip and its own build isolation, into a new environment.

The build tools are downloaded, and the C++ kernels are compiled from nothing: `make test-install`.
The new environments borrow the packages of this one (torch takes minutes to install), but not this
checkout: dpkernels comes from what was installed.
"""

from __future__ import annotations

import platform
import shutil
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import dpkernels
from tests.packaging.conftest import (
    COMPLAINT,
    broken_compiler,
    fail,
    succeed,
    without_compilers,
)

pytestmark = [pytest.mark.install, pytest.mark.timeout(900)]

PIP = ["-m", "pip", "--disable-pip-version-check"]

PRIVATE_STEP = """
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dpkernels
from dpkernels import PrivacyEngine, ops
from dpkernels.ops import native

warnings.simplefilter("ignore")
assert Path(dpkernels.__file__).is_relative_to({environment!r}), dpkernels.__file__
assert native.why_not_cpu() is None, native.why_not_cpu()
assert ops.all_ops()["finish_grads_"].preferred("cpu") == "cpu"

model = nn.Linear(8, 3)
x, y = torch.randn(6, 8), torch.randn(6, 3)
weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
clipped = []
for i in range(6):
    residual = 2 * (weight @ x[i] + bias - y[i])
    gradient = torch.cat([torch.outer(residual, x[i]), residual[:, None]], 1)
    clipped.append(gradient * min(1, 0.5 / gradient.norm()))

engine = PrivacyEngine()
private, optimizer, loader = engine.make_private(
    module=model,
    optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
    data_loader=DataLoader(TensorDataset(x, y), batch_size=6),
    noise_multiplier=1e-4,
    max_grad_norm=0.5,
    poisson_sampling=False,
)
for inputs, targets in loader:
    optimizer.zero_grad()
    (private(inputs) - targets).square().sum(1).mean().backward()
    optimizer.step()
moved = torch.cat([weight - model.weight.detach(), (bias - model.bias.detach())[:, None]], 1)
noise = (moved - torch.stack(clipped).mean(0)).abs().max().item()
assert 0 < noise < 1e-4, noise
assert engine.get_epsilon(delta=1e-5) > 0
print("a private step on", native.load("cpu").instruction_set)
"""


class Environment:
    """A new virtual environment, with the pip that Python brings."""

    def __init__(self, folder: Path):
        venv.create(folder, with_pip=True)
        self.folder = folder
        self.python = folder / "bin" / "python"

    def pip(self, *arguments: str | Path, where: Path, **environ: str) -> str:
        return succeed([*PIP, *arguments], where, python=self.python, **environ)

    def borrow_packages(self) -> None:
        """Find what is installed here, after what is installed there."""
        names = {"base": str(self.folder), "platbase": str(self.folder)}
        site = Path(sysconfig.get_path("purelib", vars=names))
        paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        (site / "borrowed.pth").write_text("\n".join(sorted(paths)) + "\n")

    def run(self, *arguments: str) -> str:
        """Run Python where no source lies about."""
        nowhere = self.folder / "nowhere"
        nowhere.mkdir(exist_ok=True)
        return succeed(list(arguments), nowhere, python=self.python, PYTHONPATH="")


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path / "environment")


@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
def test_a_wheel_trains_on_the_native_extension(environment: Environment, source: Path) -> None:
    environment.pip("wheel", ".", "--no-deps", "-w", "wheels", where=source, DPKERNELS_BUILD="cpu")
    (wheel,) = (source / "wheels").glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        names = packed.namelist()
    assert "dpkernels/py.typed" in names
    built = {name.split(".")[1] for name in names if name.startswith("dpkernels/_cpu.")}
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    assert built == ({"baseline", "avx2", "avx512"} if x86 else {"baseline"})
    environment.pip("install", "--no-deps", wheel, where=source)
    environment.borrow_packages()
    shutil.rmtree(source)
    step = PRIVATE_STEP.format(environment=str(environment.folder))
    assert "a private step on" in environment.run("-c", step)
    assert "compiled, " in environment.run("-m", "dpkernels", "info")
    assert environment.run("-m", "dpkernels", "--version").split()[1] == dpkernels.__version__


def assert_pure_python(environment: Environment) -> None:
    environment.borrow_packages()
    info = " ".join(environment.run("-m", "dpkernels", "info").split())
    assert "the cpu extension was not built (reinstall with a C++ compiler" in info


def test_install_where_no_compiler_exists(
    environment: Environment, source: Path, tmp_path: Path
) -> None:
    machine = without_compilers(tmp_path)
    environment.pip("install", "--no-deps", ".", where=source, **machine)
    assert_pure_python(environment)


def test_install_the_source_archive_without_compiling(
    environment: Environment, archive: Path, tmp_path: Path
) -> None:
    environment.pip("install", "--no-deps", archive, where=tmp_path, DPKERNELS_BUILD="off")
    assert_pure_python(environment)


def test_what_pip_says_of_a_compiler_that_fails(
    environment: Environment, source: Path, tmp_path: Path
) -> None:
    arguments = [*PIP, "wheel", ".", "--no-deps", "-w", "wheels"]
    mode = {"DPKERNELS_BUILD": "cpu", "CXX": str(broken_compiler(tmp_path))}
    printed = fail(arguments, source, python=environment.python, **mode)
    assert COMPLAINT in printed
    assert "DPKERNELS_BUILD=off installs without compiling" in printed
