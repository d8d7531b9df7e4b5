"""The command ``dpkernels``: `info` here, everything else registered by the room it belongs to."""

from __future__ import annotations

import importlib
from typing import Annotated

import typer

import dpkernels

# Command, module whose `register(app)` adds it, extra that brings what the module imports.
_COMMANDS = (
    ("account", "dpkernels.accounting.cli", "dpkernels"),
    ("risk", "dpkernels.reconstruction.cli", "dpkernels"),
    ("audit", "dpkernels.attacks.cli", "dpkernels"),
    ("segment", "dpkernels.segmentation.cli", "dpkernels[segmentation]"),
    ("classify", "dpkernels.classification.cli", "dpkernels[classification]"),
)

app = typer.Typer(
    name="dpkernels",
    help="Differentially private training at the price of an ordinary step.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"dpkernels {dpkernels.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Differentially private training at the price of an ordinary step."""


@app.command()
def info() -> None:
    """Versions, device, native extensions, the backend of each op and why not the others."""
    from dpkernels.info import show

    show()


def _register(command: str, module: str, requirement: str) -> None:
    """Let `module` add its command; if it cannot be imported, a command that says so."""
    try:
        importlib.import_module(module).register(app)
    except ImportError as error:
        _register_missing(command, f"{error}; pip install '{requirement}'")


def _register_missing(command: str, reason: str) -> None:
    @app.command(
        command,
        help=f"Not available: {reason}",
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )
    def missing(context: typer.Context) -> None:
        typer.echo(f"dpkernels {command} is not available: {reason}", err=True)
        raise typer.Exit(1)


for _command in _COMMANDS:
    _register(*_command)
