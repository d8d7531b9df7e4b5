"""Opacus' own accountants at their defaults, without torch.

``import opacus.accountants`` runs Opacus' ``__init__``, which imports torch: seconds, for code that
needs numpy and scipy only. So its files are loaded under a package name of ours. One of them asks
for torch, ``accountant``, and holds nothing but the abstract base class; another base stands in.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

from dpkernels.accounting.events import History

MECHANISMS = {"rdp": "RDPAccountant", "prv": "PRVAccountant", "gdp": "GaussianAccountant"}
"""What Opacus calls its accountants: name in its registry, and class."""

_PACKAGE = "dpkernels.accounting._opacus"
_PRV_MAX_CELLS = 1 << 24


class _Base:
    """What the accountants take from Opacus' ``IAccountant`` when they compute epsilon."""

    def __init__(self) -> None:
        self.history: list[tuple[float, float, int]] = []


def accountant(mechanism: str) -> Any:
    """A new accountant of Opacus, with an empty history: "rdp", "prv" or "gdp".

    It computes as Opacus' does and is of another class than ``opacus.accountants`` has.

    Raises:
        ModuleNotFoundError: Opacus is not installed.
    """
    return getattr(_load(mechanism), MECHANISMS[mechanism])()


@functools.cache
def _load(module: str) -> ModuleType:
    """A module of ``opacus.accountants``, by its name in that package."""
    if _PACKAGE not in sys.modules:
        opacus = importlib.util.find_spec("opacus")
        if opacus is None or not opacus.submodule_search_locations:
            raise ModuleNotFoundError("Opacus is not installed: pip install opacus")
        package, base = ModuleType(_PACKAGE), ModuleType(f"{_PACKAGE}.accountant")
        package.__path__ = [str(Path(opacus.submodule_search_locations[0]) / "accountants")]
        base.IAccountant = _Base  # type: ignore[attr-defined]
        sys.modules.update({package.__name__: package, base.__name__: base})
    return importlib.import_module(f"{_PACKAGE}.{module}")


def _prv_cells(counted: Any, delta: float) -> int:
    """Cells that Opacus' PRV accountant would need, or 0 if it can hold them."""
    prv = _load("analysis.prv").PoissonSubsampledGaussianPRV
    domain = counted._get_domain(
        prvs=[prv(rate, sigma) for sigma, rate, _ in counted.history],
        num_self_compositions=[steps for *_, steps in counted.history],
        eps_error=0.01,
        delta_error=delta / 1000,
    )
    return int(domain.size) if domain.size > _PRV_MAX_CELLS else 0


def epsilon(mechanism: str, history: History, delta: float) -> float:
    """Epsilon under one of Opacus' accountants at its defaults.

    Args:
        mechanism: "rdp", "prv" or "gdp".
        history: what ran, not empty.
        delta: in (0, 1).

    Raises:
        ValueError: if the accountant cannot hold such a history, or fails on it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        counted = accountant(mechanism)
        counted.history = [(p.noise_multiplier, p.sample_rate, p.steps) for p in history]
        if mechanism == "gdp" and len(history) > 1:
            raise ValueError(
                "accountant='gdp': expected one noise multiplier and one sample rate, got "
                f"{len(history)} different pairs. Use accountant='tight'"
            )
        try:
            too_large = mechanism == "prv" and _prv_cells(counted, delta)
            spent = math.nan if too_large else float(counted.get_epsilon(delta=delta))
        except (ArithmeticError, RuntimeError, MemoryError, ValueError) as error:
            raise ValueError(
                f"accountant={mechanism!r}: Opacus' accountant fails on history="
                f"{counted.history!r}, delta={delta!r} ({error}). Use accountant='tight'"
            ) from error
    if too_large:
        raise ValueError(
            f"accountant='prv': Opacus' PRV accountant would need a grid of {too_large:.3g} cells "
            f"({too_large * 8 / 2**30:.3g} GiB an array) at this noise; expected at most "
            f"{_PRV_MAX_CELLS:.3g}. Use accountant='tight'"
        )
    return spent
