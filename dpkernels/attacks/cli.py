"""`dpkernels audit`: attack a training run, and compare with the accountant's epsilon."""

from __future__ import annotations

from typing import Annotated

import typer

from dpkernels.accounting import options


def audit(
    noise_multiplier: options.NoiseMultiplier = 2.0,
    sample_rate: options.SampleRate = 1.0,
    steps: options.Steps = 1,
    delta: Annotated[float, typer.Option(help="Probability left out of epsilon.")] = 1e-6,
    canaries: Annotated[
        int, typer.Option(help="Number of planted records; more can show a larger leak.")
    ] = 2000,
    max_grad_norm: Annotated[float, typer.Option(help="Clipping norm, > 0.")] = 1.0,
    clipping: Annotated[str, typer.Option(help="'flat' or 'automatic'.")] = "flat",
    confidence: Annotated[
        float, typer.Option(help="How rarely a correct engine may be accused, in (0, 1).")
    ] = 0.99,
    secure_mode: Annotated[
        bool, typer.Option("--secure-mode", help="Audit the floating-point-safe mechanism.")
    ] = False,
) -> None:
    """Check by attack that training leaks no more than the accountant says.

    Plants canaries in a small data set: records with a direction of their own, each present or
    absent by the flip of a coin. Trains once with this installation's engine, lets an attacker who
    sees every released gradient guess the coins, and turns the number of right guesses into a lower
    bound on epsilon. If the bound exceeds the accountant's epsilon, something is broken: noise,
    clipping or accounting. Exits with 1 then. The method is by Steinke, Nasr and Jagielski (2023),
    "Privacy auditing with one (1) training run".

    A bound far below the accountant's epsilon is normal: one run cannot show the whole leak.

    Example: dpkernels audit --noise-multiplier 2 --sample-rate 0.5 --steps 3
    """
    from dpkernels.attacks.one_run_audit import one_run_audit
    from dpkernels.engine.privacy_engine import PrivacyEngine

    with options.refusing():
        report = one_run_audit(
            noise_multiplier=noise_multiplier,
            sample_rate=sample_rate,
            steps=steps,
            delta=delta,
            canaries=canaries,
            max_grad_norm=max_grad_norm,
            clipping=clipping,
            confidence=confidence,
            engine=PrivacyEngine(secure_mode=secure_mode),
        )
    typer.echo(report.to_text())
    if report.violated:
        raise typer.Exit(code=1)
