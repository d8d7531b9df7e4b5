"""Float32 products that PyTorch may round to TF32, by each of its switches, old and new.

PyTorch refuses to read an old switch while a new one contradicts it, so every test puts back what
it found, and looks whether the old switches can be read again.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.engine.device.models import network_of
from tests.engine.device.support import backward, error_of, private, truth
from tests.engine.device.test_sound import largest_share
from tests.engine.truth import relative_error

#: contributions of one sample whose norm is compared with C
SAMPLES = {"cpu": 6, "cuda": 100}
#: relative error that inputs rounded to 10 bits may leave, with some room; float32's own
ROUNDED, EXACT = 2.0**-8, 1e-4

Switch = tuple[str, str, Any]
#: by name: module under ``torch.backends``, attribute, value
SWITCHES: dict[str, Switch] = {
    "old-matmul": ("cuda.matmul", "allow_tf32", True),
    "old-cudnn": ("cudnn", "allow_tf32", True),
    "old-cudnn-off": ("cudnn", "allow_tf32", False),
    "new-all": ("", "fp32_precision", "tf32"),
    "new-all-ieee": ("", "fp32_precision", "ieee"),
    "new-matmul": ("cuda.matmul", "fp32_precision", "tf32"),
    "new-matmul-ieee": ("cuda.matmul", "fp32_precision", "ieee"),
    "new-cudnn": ("cudnn", "fp32_precision", "tf32"),
    "new-cudnn-ieee": ("cudnn", "fp32_precision", "ieee"),
}
#: switches after which products of matrices are rounded on a GPU, and those that say they are not
MATRICES_ROUNDED = {"old-matmul", "new-all", "new-matmul"}
MATRICES_EXACT = {"old-cudnn", "old-cudnn-off", "new-all-ieee", "new-matmul-ieee"}


def old_switches() -> tuple[Any, ...]:
    """PyTorch raises RuntimeError where old and new switches contradict each other."""
    return (
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch.get_float32_matmul_precision(),
    )


@pytest.fixture
def switch() -> Iterator[Callable[[str], None]]:
    """Turns a switch by name; puts everything back."""
    turned: list[Switch] = []
    before = old_switches()

    def turn(name: str) -> None:
        path, attribute, value = SWITCHES[name]
        module = operator.attrgetter(path)(torch.backends) if path else torch.backends
        turned.append((module, attribute, getattr(module, attribute)))
        setattr(module, attribute, value)

    yield turn
    for module, attribute, value in reversed(turned):
        setattr(module, attribute, value)
    assert old_switches() == before


@pytest.fixture
def matmul_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def product_error(device: torch.device) -> float:
    """Relative error of an ordinary product of matrices."""
    a, b = (torch.randn(512, 512, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    return relative_error((a.to(device) @ b.to(device)).cpu(), a.double() @ b.double())


def assert_private_step(name: str, device: torch.device, tolerance: float) -> None:
    """The step of a network is right within `tolerance`, and no contribution exceeds C."""
    model, x = network_of(name, 16, device)
    expected, bound = truth(model, x)
    made = private(model, x, device, bound)
    backward(made, x)
    found = made.released()
    assert error_of(found, expected) < tolerance
    assert relative_error(found.norms, expected.norms) < tolerance
    for batches in (list(x.split(1)), [x]):
        share, clipped = largest_share(made, batches, SAMPLES[device.type])
        assert clipped > 0.5
        assert 0.97 < share <= 1.0, f"{share - 1:.3g} above C"


@pytest.mark.parametrize("network", ["positions", "images"])
@pytest.mark.parametrize("name", SWITCHES)
def test_switches(
    name: str, network: str, device: torch.device, switch: Callable[[str], None]
) -> None:
    switch(name)
    if device.type == "cuda" and name in MATRICES_ROUNDED:
        assert product_error(device) > 1e-5, "the switch does nothing here"
    exact = name == "old-cudnn-off" or (name in MATRICES_EXACT and network == "positions")
    assert_private_step(network, device, EXACT if exact else ROUNDED)


@pytest.mark.parametrize("network", ["positions", "images"])
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_matmul_precision(
    precision: str, network: str, device: torch.device, matmul_precision: None
) -> None:
    torch.set_float32_matmul_precision(precision)
    if device.type == "cuda":
        assert (product_error(device) > 1e-5) == (precision != "highest")
    exact = precision == "highest" and network == "positions"
    assert_private_step(network, device, EXACT if exact else 2.0**-6)
