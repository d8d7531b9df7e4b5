"""The risk report: what a run's noise means, in numbers that are proven and in plain words."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binom

from dpkernels.accounting import get_history_epsilon
from dpkernels.accounting.checks import check_count, check_number
from dpkernels.accounting.events import History, Phase, log_absence
from dpkernels.accounting.figure import drawing
from dpkernels.reconstruction import wording
from dpkernels.reconstruction.bounds import chosen_history, rero_bound
from dpkernels.reconstruction.from_scratch import mse_quantile, ncc_quantile, psnr_quantile
from dpkernels.reconstruction.wording import Row

_CONFIDENCE = 0.95
#: noise multipliers in the figure
_POINTS = 15
_ERROR = "mean squared error, unbiased reconstruction"
_RATIO = "PSNR of an unbiased reconstruction, dB"


@dataclass(frozen=True)
class RiskReport:
    """What `risk_report` found.

    Attributes:
        history: the phases that were assessed.
        delta: the delta of both epsilons.
        kappa: success of a guess without the model.
        rows: the lines, in reading order.
        reading: the summary in plain sentences.
    """

    history: History
    delta: float
    kappa: float
    rows: tuple[Row, ...]
    reading: tuple[str, ...]

    def to_markdown(self) -> str:
        """The report as a markdown document."""
        lines = ["# Reconstruction risk of this run", ""]
        lines += [f"{sentence}\n" for sentence in self.reading]
        for section in dict.fromkeys(row.section for row in self.rows):
            lines += [
                f"## {wording.SECTIONS[section]}",
                "",
                "| scope | quantity | value | kind | reading |",
                "|---|---|---|---|---|",
            ]
            lines += [
                f"| {row.scope} | {row.quantity} | {wording.number(row.value)} | {row.kind} "
                f"| {row.reading} |"
                for row in self.rows
                if row.section == section
            ]
            lines.append("")
        return "\n".join(lines)

    def to_json(self) -> str:
        """The report as a JSON object; what cannot be proven is null, infinity is "inf"."""
        rows = [asdict(row) for row in self.rows]
        for row in rows:
            if row["value"] == math.inf:
                row["value"] = "inf"
        return json.dumps(
            {
                "history": [asdict(phase) for phase in self.history],
                "delta": self.delta,
                "kappa": self.kappa,
                "reading": list(self.reading),
                "rows": rows,
            },
            indent=2,
            allow_nan=False,
        )

    def plot(self, path: str | Path) -> Path:
        """Draws the bounds against the noise multiplier, this run marked; needs matplotlib.

        Args:
            path: image file to write; the suffix chooses the format.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        sigma = min(phase.noise_multiplier for phase in self.history)
        scales = np.geomspace(0.1, 20.0, _POINTS)
        with drawing(path) as axes:
            for adversary, name in wording.ADVERSARIES.items():
                risks = [
                    rero_bound(
                        history=_scaled(self.history, scale), kappa=self.kappa, adversary=adversary
                    )
                    for scale in scales
                ]
                (line,) = axes.plot(scales * sigma, risks, label=name)
                here = rero_bound(history=self.history, kappa=self.kappa, adversary=adversary)
                axes.plot([sigma], [here], "o", color=line.get_color())
            axes.axvline(sigma, color="0.5", linestyle=":", label="this run")
            axes.axhline(self.kappa, color="0.5", linestyle="--", label="guessing")
            axes.set(
                xscale="log",
                yscale="log",
                ylim=(self.kappa / 2, 1.3),
                xlabel="noise multiplier",
                ylabel="probability of picking the right record (upper bound)",
            )
            axes.legend(loc="lower left", fontsize="small")
        return Path(path)


def _scaled(history: History, scale: float) -> History:
    """The history with every noise multiplier times `scale`."""
    return tuple(Phase(scale * p.noise_multiplier, p.sample_rate, p.steps) for p in history)


def _participations(history: History, delta: float, size: int) -> tuple[float, float]:
    """Summed squared precisions of the updates that contain one record: mean, and a high quantile.

    With probability 1 - delta the second is exceeded for none of the `size` records.
    """
    mean = sum(p.steps * p.sample_rate / p.noise_multiplier**2 for p in history)
    share = delta / (len(history) * size)
    high = sum(
        float(binom.isf(share, p.steps, p.sample_rate)) / p.noise_multiplier**2 for p in history
    )
    return mean, max(high, mean)


def _budget_rows(history: History, delta: float) -> list[Row]:
    stated = partial(Row, "budget", "whole run")
    tight = get_history_epsilon(history, delta=delta)
    loose: float | None = None
    try:
        loose = get_history_epsilon(history, delta=delta, accountant="rdp")
        reading = wording.accountants_differ(tight, loose)
    except (ValueError, ImportError) as error:
        reading = f"not stated: {error}"
    guarantee = "what this noise guarantees, to within 1 %"
    return [
        stated("epsilon, tight accountant", tight, "upper bound", guarantee),
        stated("epsilon, Opacus RDP accountant", loose, "upper bound", reading),
    ]


def _matching_rows(history: History, kappa: float) -> list[Row]:
    """Bounds on picking the right record among 1 / kappa candidates."""
    quietest = min(history, key=lambda phase: phase.noise_multiplier)
    scopes = {
        "one update": (Phase(quietest.noise_multiplier, 1.0, 1),),
        "whole run": history,
    }
    return [
        Row(
            "matching",
            scope,
            f"success of the {wording.ADVERSARIES[adversary]}",
            gamma := rero_bound(history=phases, kappa=kappa, adversary=adversary),
            "upper bound",
            wording.success(gamma, kappa),
        )
        for scope, phases in scopes.items()
        for adversary in ("worst_case", "relaxed")
    ]


def _from_scratch_rows(
    precision: float, scope: str, dimension: int, data_norm: float | None, data_range: float | None
) -> list[Row]:
    """Bounds on a reconstruction without prior knowledge, at a summed squared precision."""
    stated = partial(Row, "from scratch", scope)
    sigma = 1 / math.sqrt(precision)
    unlikely = 1 - _CONFIDENCE
    holds = f"holds with probability {_CONFIDENCE:.0%}"
    rows = []
    for quantity, values in zip(
        wording.CORRELATIONS, (dimension, min(dimension, wording.COARSE)), strict=True
    ):
        bound = ncc_quantile(unlikely, noise_multiplier=sigma, dimension=values)
        reading = f"{wording.correlation(bound)}; {holds}"
        rows.append(stated(quantity, bound, "upper bound", reading))
    if data_norm is None:
        return [*rows, _unproven(scope, _ERROR, "data_norm")]
    known: dict[str, Any] = {
        "noise_multiplier": sigma,
        "dimension": dimension,
        "data_norm": data_norm,
    }
    blank = data_norm**2 / dimension
    reading = f"{holds}; a blank image errs by {blank:.3g}"
    rows.append(stated(_ERROR, mse_quantile(unlikely, **known), "lower bound", reading))
    if data_range is None:
        return [*rows, _unproven(scope, _RATIO, "data_range")]
    ratio = psnr_quantile(unlikely, **known, data_range=data_range)
    reading = f"{holds}; a blank image has {10 * math.log10(data_range**2 / blank):.3g}"
    return [*rows, stated(_RATIO, ratio, "upper bound", reading)]


def _unproven(scope: str, quantity: str, argument: str) -> Row:
    reading = f"no bound can be proven without {argument}"
    return Row("from scratch", scope, quantity, None, "not stated", reading)


def risk_report(
    *,
    noise_multiplier: float | None = None,
    sample_rate: float | None = None,
    steps: int | None = None,
    delta: float,
    dataset_size: int,
    dimension: int | None = None,
    data_norm: float | None = None,
    data_range: float | None = None,
    kappa: float | None = None,
    history: Iterable[Phase | tuple[float, float, int]] | None = None,
) -> RiskReport:
    """States what the noise of a run protects against: budgets, bounds, and how to read them.

    Args:
        noise_multiplier: std of the noise divided by max_grad_norm, > 0.
        sample_rate: probability that a record joins a step, in (0, 1].
        steps: number of steps, an integer >= 1.
        delta: in (0, 1).
        dataset_size: number of training records, >= 2.
        dimension: values per record (voxels times channels); needed for "from scratch".
        data_norm: Euclidean norm of a record; needed for errors in data units.
        data_range: largest minus smallest possible value; needed for the PSNR.
        kappa: success of a guess without the model; default 1 / dataset_size.
        history: phases or (noise_multiplier, sample_rate, steps) tuples as an accountant keeps
            them, instead of the first three arguments.

    Raises:
        ValueError: naming the argument that is out of range; in particular a step without noise,
            for which there is no bound.

    Guarantees:
        A value labelled "upper bound" or "lower bound" is one; where none can be proven the
        value is None and the row says why.
    """
    delta = check_number("delta", delta, above=0.0, below=1.0)
    size = check_count("dataset_size", dataset_size, at_least=2)
    kappa = 1 / size if kappa is None else check_number("kappa", kappa, above=0.0, below=1.0)
    phases = chosen_history(noise_multiplier, sample_rate, steps, history)
    if not phases:
        raise ValueError(
            "history: expected at least one step with sample_rate > 0, got none; a run that used "
            "no data has no risk to report"
        )
    rows = _run_rows(phases, delta, size)
    rows += _budget_rows(phases, delta) + _matching_rows(phases, kappa)
    if dimension is None:
        rows.append(_unproven("one update", wording.CORRELATIONS[0], "dimension"))
    else:
        dimension = check_count("dimension", dimension)
        mean, high = _participations(phases, delta, size)
        loudest = max(1 / p.noise_multiplier**2 for p in phases)
        for scope, precision in (
            ("one update", loudest),
            ("whole run, typical record", max(mean, loudest)),
            ("whole run, most exposed record", max(high, loudest)),
        ):
            rows += _from_scratch_rows(precision, scope, dimension, data_norm, data_range)
    reading = wording.summary(phases, rows, kappa, delta, size)
    return RiskReport(phases, delta, kappa, tuple(rows), reading)


def _run_rows(history: History, delta: float, size: int) -> list[Row]:
    least = min(phase.noise_multiplier for phase in history)
    joins = sum(phase.steps * phase.sample_rate for phase in history)
    given = [
        (
            "noise multiplier",
            least,
            "std of the noise over the clipping norm"
            + ("; the least of the run" if len(history) > 1 else ""),
        ),
        ("steps", sum(phase.steps for phase in history), "updates of the model"),
        (
            "sample rate",
            max(phase.sample_rate for phase in history),
            "chance of a record to join an update"
            + ("; the greatest of the run" if len(history) > 1 else ""),
        ),
        ("expected participations", joins, "updates that one record joins on average"),
        (
            "chance to join at all",
            -math.expm1(log_absence(history)),
            "a record that joins no update leaves no trace in the model",
        ),
        ("delta", delta, "probability left out of both epsilons"),
        ("dataset size", size, "training records"),
    ]
    return [Row("run", "run", name, value, "given", reading) for name, value, reading in given]
