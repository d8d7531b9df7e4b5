"""Time, memory and tightness of accountants: ours, Opacus' three, Google's dp-accounting.

Each question is asked in a process of its own, forked from a server that has imported everything,
with a time limit: the epsilon of a given noise (our calibration to the nominal budget, so an exact
accountant answers the budget less 0.05 %), the seconds of the call, and the growth of memory.
"""

from __future__ import annotations

import importlib
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import Annotated

import torch
import typer

from bench import memory, results, table, work
from bench.part import How, Part, Row, Todo
from bench.table import number
from dpkernels.accounting import get_epsilon, get_noise_multiplier, opacus_accountants

RUNS = {"subsampled": (0.01, 5000), "volumes": (1 / 106, 53_000)}
BUDGETS = (0.01, 1.0, 8.0, 100.0, 1e4, 1e6, 1e9, 1e15)
DELTA = 8e-7
ACCOUNTANTS = ("tight", "rdp", "prv", "gdp", "dp-accounting")
LIMIT_S = 40.0
_PACKAGES = ("numpy", "scipy", "opacus", "dp-accounting")
#: the grid of dp-accounting, as a share of the epsilon that is asked for: it wants to be told
_GRID = 2e-5

# The server from which processes are forked imports this module: what it has, they have.
with suppress(ImportError):
    importlib.import_module("dp_accounting.pld.privacy_loss_distribution")
with suppress(ImportError), warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for _mechanism in opacus_accountants.MECHANISMS:
        opacus_accountants.accountant(_mechanism)


def todo(
    how: How,
    limit: Annotated[float, typer.Option(help="Seconds per question.")] = LIMIT_S,
) -> Todo:
    """The same question to every accountant, for each run and budget."""
    items = {
        f"{run}, epsilon {nominal:g}": partial(_measure, run, nominal, limit)
        for nominal in BUDGETS
        for run in RUNS
    }
    return Todo(items, how)


def ask(
    accountant: str, sigma: float, rate: float, steps: int, nominal: float, limit: float
) -> dict[str, object]:
    """One question in a process of its own: epsilon, seconds, memory_mb, outcome."""
    arguments = (accountant, sigma, rate, steps, nominal)
    outcome = f"no answer in {limit:g} s"
    late = {"epsilon": None, "seconds": limit, "memory_mb": None, "outcome": outcome}
    return memory.in_fresh_process(_answer, arguments, limit) or late


def _answer(
    sender: Connection, accountant: str, sigma: float, rate: float, steps: int, nominal: float
) -> None:
    warnings.simplefilter("ignore")
    memory.return_freed()
    torch.set_num_threads(1)
    question = _google if accountant == "dp-accounting" else partial(_ours, accountant)
    growth = memory.Growth()
    began = time.perf_counter()
    try:
        epsilon, outcome = f"{question(sigma, rate, steps, nominal):.10g}", "ok"
    except Exception as error:
        epsilon, outcome = None, f"{type(error).__name__}: {error}"[:100]
    answer = {"epsilon": epsilon, "seconds": time.perf_counter() - began}
    sender.send({**answer, "memory_mb": growth.peak_mb(), "outcome": outcome})


def _ours(accountant: str, sigma: float, rate: float, steps: int, nominal: float) -> float:
    return get_epsilon(
        noise_multiplier=sigma, sample_rate=rate, steps=steps, delta=DELTA, accountant=accountant
    )


def _google(sigma: float, rate: float, steps: int, nominal: float) -> float:
    from dp_accounting.pld import privacy_loss_distribution as pld

    one = pld.from_gaussian_mechanism(
        sigma, sampling_prob=rate, value_discretization_interval=_GRID * nominal
    )
    return one.self_compose(steps).get_epsilon_for_delta(DELTA)


def _measure(run: str, nominal: float, limit: float, report: work.Report) -> Iterator[list[Row]]:
    rate, steps = RUNS[run]
    sigma = get_noise_multiplier(
        target_epsilon=nominal, target_delta=DELTA, sample_rate=rate, steps=steps
    )
    rows = []
    for index, accountant in enumerate(ACCOUNTANTS):
        report(accountant, index / len(ACCOUNTANTS))
        answer = ask(accountant, sigma, rate, steps, nominal, limit)
        epsilon = answer["epsilon"]
        rows.append(
            {
                "run": run,
                "sample_rate": f"{rate:.6g}",
                "steps": steps,
                "delta": DELTA,
                "nominal_epsilon": f"{nominal:g}",
                "noise_multiplier": f"{sigma:.8g}",
                "accountant": accountant,
                "epsilon": epsilon,
                "over_nominal": f"{float(str(epsilon)) / nominal:.6g}" if epsilon else None,
                **answer,
                **{name.replace("-", "_"): results.version_of(name) for name in _PACKAGES},
            }
        )
    yield rows


def digest(rows: list[dict[str, str]]) -> list[str]:
    """By accountant: over the budget it was calibrated for, and time."""
    parts = []
    for name in dict.fromkeys(row["accountant"] for row in rows):
        own = [row for row in rows if row["accountant"] == name]
        answered = [row for row in own if number(row["over_nominal"]) is not None]
        if not answered:
            continue
        over = [float(row["over_nominal"]) for row in answered]
        seconds = [float(row["seconds"]) for row in answered]
        parts.append(
            f"{name} {len(answered)} of {len(own)} answered, epsilon {min(over):.4g} to "
            f"{max(over):.4g} of nominal, at most {max(seconds):.2g} s"
        )
    if not parts:
        return []
    return [f"Accountants, epsilon 0.01 to 1e15: {'; '.join(parts)}. ({table.provenance(rows)})"]


PART = Part(
    "accounting",
    "Time, memory and tightness of our accountant, Opacus' three and Google's.",
    ("device", "run", "nominal_epsilon", "accountant"),
    todo,
    seconds=80.0,
    digest=digest,
)
