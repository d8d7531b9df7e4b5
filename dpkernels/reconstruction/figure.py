"""The figure of the risk report: bounds against the noise, the run marked. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dpkernels.accounting.events import History, Phase
from dpkernels.reconstruction import wording
from dpkernels.reconstruction.bounds import rero_bound

_POINTS = 15


def draw(history: History, kappa: float, path: Path) -> Path:
    """Writes the figure.

    Args:
        history: the run; other noises are the run's, all scaled alike.
        kappa: success of a guess without the model.
        path: image file to write; the suffix chooses the format.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "the figure needs matplotlib: pip install 'dpkernels[segmentation]' or matplotlib"
        ) from error
    sigma = min(phase.noise_multiplier for phase in history)
    scales = np.geomspace(0.1, 20.0, _POINTS)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for adversary, name in wording.ADVERSARIES.items():
        risks = [
            rero_bound(
                history=[
                    Phase(scale * p.noise_multiplier, p.sample_rate, p.steps) for p in history
                ],
                kappa=kappa,
                adversary=adversary,
            )
            for scale in scales
        ]
        (line,) = axes.plot(scales * sigma, risks, label=name)
        here = rero_bound(history=history, kappa=kappa, adversary=adversary)
        axes.plot([sigma], [here], "o", color=line.get_color())
    axes.axvline(sigma, color="0.5", linestyle=":", label="this run")
    axes.axhline(kappa, color="0.5", linestyle="--", label="guessing")
    axes.set(
        xscale="log",
        yscale="log",
        ylim=(kappa / 2, 1.3),
        xlabel="noise multiplier",
        ylabel="probability of picking the right record (upper bound)",
    )
    axes.legend(loc="lower left", fontsize="small")
    figure.savefig(path, dpi=150)
    return path
