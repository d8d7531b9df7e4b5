"""`dpkernels account`: from noise to epsilon and back, under every accountant."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from dpkernels.accounting import options
from dpkernels.accounting.accountants import ACCOUNTANTS
from dpkernels.accounting.api import get_epsilon, get_noise_multiplier
from dpkernels.accounting.figure import drawing

_PLOT_EPSILONS = (0.1, 0.3, 1, 3, 8, 20, 100, 1e3, 1e4, 1e6, 1e9, 1e12)


def account(
    sample_rate: options.SampleRate,
    steps: options.Steps,
    delta: options.Delta,
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
    noise = partial(get_noise_multiplier, target_delta=delta, sample_rate=sample_rate, steps=steps)
    convert: Callable[..., float]
    if epsilon is not None and noise_multiplier is None:
        title, convert = "noise multiplier", partial(noise, target_epsilon=epsilon)
    elif noise_multiplier is not None and epsilon is None:
        title = "epsilon"
        convert = partial(
            get_epsilon,
            noise_multiplier=noise_multiplier,
            sample_rate=sample_rate,
            steps=steps,
            delta=delta,
        )
    else:
        raise typer.BadParameter("expected exactly one of --epsilon and --noise-multiplier")
    typer.echo(f"{'accountant':<12}{title}")
    refused = 0
    names = accountant or ["tight", "rdp"]
    for name in names:
        try:
            typer.echo(f"{name:<12}{convert(accountant=name):.8g}")
        except ValueError as error:
            refused += 1
            typer.echo(f"{name:<12}refused: {error}", err=True)
    if refused == len(names):
        raise typer.Exit(code=2)
    if plot is not None:
        with options.plotting(plot):
            _draw(noise, names, plot)


def _draw(noise: Callable[..., float], names: list[str], path: Path) -> None:
    """Draws noise multiplier against epsilon; a budget that an accountant refuses is left out."""
    with drawing(path) as axes:
        for name in names:
            points = []
            for target in _PLOT_EPSILONS:
                with contextlib.suppress(ValueError):
                    points.append((target, noise(target_epsilon=target, accountant=name)))
            if points:
                axes.plot(*zip(*points, strict=True), "o-", label=name)
        axes.set(xscale="log", yscale="log", xlabel="epsilon", ylabel="noise multiplier it needs")
        axes.legend()
