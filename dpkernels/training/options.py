"""What the command lines of all trainers share. Light: torch and MONAI are loaded on use only."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from dpkernels.training.config import RunConfig
    from dpkernels.training.progress import ConsoleDisplay
    from dpkernels.training.trainer import Trainer, TrainingResult

    Config = TypeVar("Config", bound=RunConfig)

Run = Annotated[Path, typer.Argument(help="Run folder that `train` wrote.")]
Epsilon = Annotated[float | None, typer.Option(help="Privacy budget; smaller is more private.")]
Delta = Annotated[float | None, typer.Option(help="Must be well below 1 / training patients.")]
NoiseMultiplier = Annotated[
    float | None, typer.Option(help="Set the noise directly, instead of --epsilon.")
]
InsecureFixedNoise = Annotated[
    int | None,
    typer.Option(help="Seed for noise and sampling: for tests only, voids the guarantee."),
]
NonPrivate = Annotated[
    bool, typer.Option("--non-private", help="Train without any guarantee, to compare.")
]
ConfigFile = Annotated[
    Path | None, typer.Option(help="YAML laid over the preset (see any config.yaml).")
]
Override = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="One setting, such as training.steps=200 or network.channels=[16,32,64]. "
        "Repeatable; wins over --config.",
    ),
]
Steps = Annotated[int | None, typer.Option(help="Optimizer steps.")]
Seed = Annotated[
    int | None,
    typer.Option(help="Initialisation, split and augmentation. Never noise or sampling."),
]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda[:N].")]
Out = Annotated[Path | None, typer.Option(help="Run folder. Default: runs/<preset>-<date>-<time>.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue the run in --out where it stopped.")
]

#: what `terminal` says after Ctrl-C
RESUME = "If steps were taken: the same command, with --resume and --out RUN, continues the run."
AGAIN = "Started again in the same way, it goes on where it stopped."

_NOTHING = object()


def privacy_changes(
    epsilon: float | None, delta: float | None, noise_multiplier: float | None, non_private: bool
) -> dict[str, Any]:
    """What --epsilon, --delta, --noise-multiplier and --non-private change in a configuration.

    Raises:
        ValueError: two that exclude each other.
    """
    options = {
        "--epsilon": epsilon,
        "--noise-multiplier": noise_multiplier,
        "--non-private": non_private or None,
    }
    given = [name for name, value in options.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} exclude each other; give one of them")
    changes: dict[str, Any] = {"privacy.delta": delta, "privacy.epsilon": epsilon}
    if noise_multiplier is not None:
        changes |= {"privacy.noise_multiplier": noise_multiplier, "privacy.epsilon": _NOTHING}
    if epsilon is not None:
        changes["privacy.noise_multiplier"] = _NOTHING
    if non_private:
        changes["privacy.enabled"] = False
    return changes


def configuration(
    kind: type[Config],
    *,
    preset: str,
    config: Path | None,
    changes: Mapping[str, Any],
    overrides: Sequence[str],
    out: Path | None = None,
    resume: bool = False,
) -> Config:
    """Preset or stored run, then --config, then options, then --set.

    Args:
        kind: the dataclass of the task.
        preset: name of the starting point of a new run.
        config: YAML file.
        changes: dotted path to value; None: not given.
        overrides: `section.name=value`.
        out: run folder; needed to resume.
        resume: start from the configuration of the run in `out`.

    Raises:
        ValueError: a faulty setting, by name.
    """
    from dpkernels.training.run_folder import RunFolder
    from dpkernels.training.settings import load_yaml, merge, nest, parse_override

    if not resume:
        values = kind.preset_values(preset)
    elif out is None:
        raise ValueError("--resume needs --out: the folder of the run to continue")
    else:
        values = load_yaml(RunFolder.open(out).config)
    layers = [load_yaml(config)] if config is not None else []
    for path, value in changes.items():
        if value is not None:
            layers.append(nest(path, None if value is _NOTHING else value))
    for layer in (*layers, *map(parse_override, overrides)):
        values = merge(values, layer)
    return kind.from_dict(values)


def common_changes(
    *, data: Path | None, patients_csv: Path | None, steps: int | None, device: str | None
) -> dict[str, Any]:
    """What the options that every task has change, by dotted path; None: not given."""
    return {
        "data.root": str(data.resolve()) if data else None,
        "data.patients_csv": str(patients_csv.resolve()) if patients_csv else None,
        "training.steps": steps,
        "training.device": device,
    }


def display(console: Console) -> ConsoleDisplay:
    """Bars on the terminal, lines elsewhere."""
    from dpkernels.training.progress import ConsoleDisplay

    return ConsoleDisplay(console)


@contextlib.contextmanager
def terminal(go_on: str = "", console: Console | None = None) -> Iterator[Console]:
    """The terminal during a command: faults of the user's input end in one line and exit code 2.

    A warning is one line. Of torchrun's processes only the first prints.

    Args:
        go_on: what to do after Ctrl-C, where something can be continued.
        console: what stands in the terminal's place.
    """
    if console is None:
        from rich.console import Console

        console = Console(
            quiet="TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("RANK") != "0"
        )

    def say(text: str, style: str) -> None:
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def warn(message: Warning | str, *_: Any, **__: Any) -> None:
        say(f"Warning: {message}", "yellow")

    with warnings.catch_warnings():
        warnings.showwarning = warn
        try:
            yield console
        except (ValueError, OSError, FloatingPointError) as error:
            console.quiet = False
            say(f"Error: {error}", "red")
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            console.print(f"Stopped. {go_on}".rstrip(), soft_wrap=True)
            raise typer.Exit(130) from error


@contextlib.contextmanager
def writing(title: str, total: int) -> Iterator[Callable[[], None]]:
    """What surrounds a command that writes a data set: yields what counts one item as written."""
    with terminal() as console, display(console).counting(title, total) as advance:
        yield advance


def print_report(console: Console, trainer: Trainer) -> None:
    """The privacy report of a run, also where its folder can only be read."""
    from rich.markdown import Markdown

    report = trainer.privacy_report()
    console.print(Markdown(report.to_markdown()))
    try:
        trainer.save_report(report)
    except OSError as error:
        console.print(f"Not saved: {error}", style="yellow", markup=False, soft_wrap=True)


def print_outcome(
    console: Console, result: TrainingResult, unit: str, files: Mapping[str, str]
) -> None:
    """The budget spent, and where to look next.

    Args:
        console: where to.
        result: of the run.
        unit: what the guarantee protects.
        files: what this task wrote besides what every task writes, with its meaning.
    """
    if result.epsilon is None:
        console.print("[bold]No privacy guarantee[/] (--non-private).")
    else:
        console.print(f"[bold]epsilon {result.epsilon:.4g}[/] per {unit}, {result.steps} steps.")
    everything = {
        "privacy_report.md": "what is guaranteed, in plain language",
        "progress.png": "loss, epsilon and clipped share over the steps",
        **files,
        "checkpoints/": "weights",
    }
    print_files(console, result.folder, everything)


def print_files(console: Console, folder: Path, files: Mapping[str, str]) -> None:
    """What lies in a folder, with its meaning."""
    for name, meaning in files.items():
        console.print(f"  {folder / name}  [dim]{meaning}[/]", highlight=False, soft_wrap=True)
