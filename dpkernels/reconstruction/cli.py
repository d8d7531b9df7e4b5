"""`dpkernels risk`: the risk report on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dpkernels.accounting import options
from dpkernels.reconstruction.report import risk_report


def risk(
    noise_multiplier: options.NoiseMultiplier,
    sample_rate: options.SampleRate,
    steps: options.Steps,
    dataset_size: Annotated[int, typer.Option(help="Number of training records (patients).")],
    delta: options.Delta,
    dimension: Annotated[
        int | None, typer.Option(help="Values per record, e.g. voxels of a volume.")
    ] = None,
    data_norm: Annotated[
        float | None, typer.Option(help="Euclidean norm of a record, for errors in its units.")
    ] = None,
    data_range: Annotated[
        float | None, typer.Option(help="Largest minus smallest value, for the PSNR.")
    ] = None,
    kappa: Annotated[
        float | None,
        typer.Option(help="Attacker's success without the model. Default: 1 / dataset size."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw risk against noise into this image file.")
    ] = None,
) -> None:
    """Say in plain words what a training run's noise protects against.

    Prints both privacy budgets (tight, and Opacus' RDP as the literature quotes it) and proven
    upper bounds on reconstruction attacks, for one update and for the whole run.

    Example: dpkernels risk --noise-multiplier 0.78 --sample-rate 0.0094 --steps 53000
    --dataset-size 106 --delta 8e-7 --dimension 819200
    """
    with options.refusing():
        report = risk_report(
            noise_multiplier=noise_multiplier,
            sample_rate=sample_rate,
            steps=steps,
            delta=delta,
            dataset_size=dataset_size,
            dimension=dimension,
            data_norm=data_norm,
            data_range=data_range,
            kappa=kappa,
        )
    typer.echo(report.to_json() if as_json else report.to_markdown())
    if plot is not None:
        with options.plotting(plot):
            report.plot(plot)
