"""`dpkernels account`: from noise to epsilon and back, under every accountant."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dpkernels.accounting.accountants import ACCOUNTANTS
from dpkernels.accounting.api import get_epsilon, get_noise_multiplier

_PLOT_EPSILONS = (0.1, 0.3, 1, 3, 8, 20, 100, 1e3, 1e4, 1e6, 1e9, 1e12)


def account(
    sample_rate: Annotated[
        float, typer.Option(help="Chance of a record to join a step: batch size / dataset size.")
    ],
    steps: Annotated[int, typer.Option(help="Number of training steps.")],
    delta: Annotated[
        float, typer.Option(help="Probability left out of epsilon; well below 1 / dataset size.")
    ],
    epsilon: Annotated[
        float | None, typer.Option(help="Target budget: prints the noise multiplier it needs.")
    ] = None,
    noise_multiplier: Annotated[
        float | None, typer.Option(help="Noise multiplier: prints the budget it spends.")
    ] = None,
    accountant: Annotated[
        list[str] | None,
        typer.Option(
            help=f"One of {', '.join(ACCOUNTANTS)}; repeat for several. gdp approximates and can "
            "state less than the true epsilon: no guarantee."
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw the noise each budget needs into this file.")
    ] = None,
) -> None:
    """Convert between a privacy budget (epsilon) and the noise multiplier.

    Give either --epsilon or --noise-multiplier. "tight" is exact to within 1 % at any budget;
    "rdp" is Opacus' default, which the budgets of most papers refer to. The same epsilon means
    different noise under each: a budget without its accountant means nothing.

    Example: dpkernels account --sample-rate 0.01 --steps 5000 --delta 8e-7 --epsilon 8
    """
    if (epsilon is None) == (noise_multiplier is None):
        raise typer.BadParameter("expected exactly one of --epsilon and --noise-multiplier")
    title = "noise multiplier" if noise_multiplier is None else "epsilon"
    typer.echo(f"{'accountant':<12}{title}")
    refused = 0
    names = accountant or ["tight", "rdp"]
    for name in names:
        try:
            if epsilon is not None:
                value = get_noise_multiplier(
                    target_epsilon=epsilon,
                    target_delta=delta,
                    sample_rate=sample_rate,
                    steps=steps,
                    accountant=name,
                )
            elif noise_multiplier is not None:
                value = get_epsilon(
                    noise_multiplier=noise_multiplier,
                    sample_rate=sample_rate,
                    steps=steps,
                    delta=delta,
                    accountant=name,
                )
            typer.echo(f"{name:<12}{value:.8g}")
        except ValueError as error:
            refused += 1
            typer.echo(f"{name:<12}refused: {error}", err=True)
    if refused == len(names):
        raise typer.Exit(code=2)
    if plot is not None:
        try:
            _draw(sample_rate, steps, delta, names, plot)
        except ImportError as error:
            raise typer.BadParameter("--plot needs matplotlib: pip install matplotlib") from error
        except (ValueError, OSError) as error:
            raise typer.BadParameter(str(error), param_hint="--plot") from error
        typer.echo(f"figure: {plot}", err=True)


def _draw(sample_rate: float, steps: int, delta: float, names: list[str], path: Path) -> None:
    """Draws noise multiplier against epsilon; a budget that an accountant refuses is left out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name in names:
        points = []
        for target in _PLOT_EPSILONS:
            try:
                noise = get_noise_multiplier(
                    target_epsilon=target,
                    target_delta=delta,
                    sample_rate=sample_rate,
                    steps=steps,
                    accountant=name,
                )
            except ValueError:
                continue
            points.append((target, noise))
        if points:
            axes.plot(*zip(*points, strict=True), "o-", label=name)
    axes.set(xscale="log", yscale="log", xlabel="epsilon", ylabel="noise multiplier it needs")
    axes.legend()
    figure.savefig(path, dpi=150)


def register(app: typer.Typer) -> None:
    """Adds the command `account` to an application."""
    app.command("account")(account)
