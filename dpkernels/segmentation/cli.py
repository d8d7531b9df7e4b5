"""`dpkernels segment ...`: train, evaluate, predict, report, phantom."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from types import TracebackType

    from rich.console import Console
    from rich.table import Table

    from dpkernels.segmentation.config import SegmentationConfig
    from dpkernels.segmentation.progress import ConsoleDisplay
    from dpkernels.segmentation.trainer import TrainingResult

_HELP = """Train 3D segmentation models with differential privacy, counted per patient.

Start with `dpkernels segment train`: it writes a synthetic liver data set, trains on it at
epsilon 8 and leaves a run folder with metrics, pictures and a privacy report. Then pass your own
data with --data: a Medical Segmentation Decathlon folder (dataset.json, imagesTr, labelsTr)."""

app = typer.Typer(help=_HELP, no_args_is_help=True)

_RunArgument = Annotated[Path, typer.Argument(help="Run folder that `train` wrote.")]


def register(parent: typer.Typer) -> None:
    """Add the `segment` commands to the command line of the package."""
    parent.add_typer(app, name="segment", help=_HELP)


@app.command()
def train(
    data: Annotated[
        Path | None,
        typer.Option(help="Decathlon folder. Default: the embedded synthetic phantom."),
    ] = None,
    preset: Annotated[
        str, typer.Option(help="Named starting point: phantom, msd-liver, msd-liver-fast.")
    ] = "phantom",
    epsilon: Annotated[
        float | None, typer.Option(help="Privacy budget; smaller is more private.")
    ] = None,
    delta: Annotated[
        float | None, typer.Option(help="Must be well below 1 / training patients.")
    ] = None,
    noise_multiplier: Annotated[
        float | None, typer.Option(help="Set the noise directly, instead of --epsilon.")
    ] = None,
    insecure_fixed_noise: Annotated[
        int | None,
        typer.Option(help="Seed for noise and sampling: for tests only, voids the guarantee."),
    ] = None,
    non_private: Annotated[
        bool, typer.Option("--non-private", help="Train without any guarantee, to compare.")
    ] = False,
    config: Annotated[
        Path | None, typer.Option(help="YAML laid over the preset (see any config.yaml).")
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="One setting, such as training.steps=200 or network.channels=[16,32,64]. "
            "Repeatable; wins over --config.",
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    patients: Annotated[
        Path | None,
        typer.Option(help="CSV with columns scan,patient_id when patients have several scans."),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Initialisation, split and augmentation. Never noise or sampling."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda[:N].")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder. Default: runs/<preset>-<date>-<time>.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out where it stopped.")
    ] = False,
) -> None:
    """Train, evaluate and report; everything lands in one run folder.

    Examples:

      dpkernels segment train

      dpkernels segment train --data Task03_Liver --preset msd-liver --epsilon 8 --out runs/liver

      dpkernels segment train --resume --out runs/liver
    """
    from dpkernels.segmentation.trainer import SegmentationTrainer

    console = _console()
    with _PlainErrors(console):
        if resume and out is None:
            raise ValueError("--resume needs --out: the folder of the run to continue")
        changes = {
            "data.root": str(data.resolve()) if data else None,
            "data.patients_csv": str(patients.resolve()) if patients else None,
            "training.steps": steps,
            "training.seed": seed,
            "training.device": device,
            "privacy.insecure_fixed_noise": insecure_fixed_noise,
            **_privacy_changes(epsilon, delta, noise_multiplier, non_private),
        }
        base = _stored(out) if resume and out is not None else _preset(preset)
        start = _configuration(base, config, changes, override or [])
        trainer = SegmentationTrainer(start, out, _display(console))
        console.print(f"Run folder: [bold]{trainer.folder.root}[/]", highlight=False)
        result = trainer.fit(resume=resume)
        _print_result(console, result)


@app.command()
def evaluate(run: _RunArgument) -> None:
    """Evaluate a run again on its held-out patients (metrics.json, overlays/)."""
    from dpkernels.segmentation.evaluate import summarise
    from dpkernels.segmentation.trainer import SegmentationTrainer

    console = _console()
    with _PlainErrors(console):
        results = SegmentationTrainer.from_run(run, _display(console)).evaluate()
        console.print(_metrics_table(summarise(results)))


@app.command()
def predict(
    run: _RunArgument,
    source: Annotated[Path, typer.Argument(metavar="IN", help="NIfTI file or folder of them.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the label maps.")],
) -> None:
    """Segment new scans; each label map lies on the grid of its own file."""
    from dpkernels.segmentation.trainer import SegmentationTrainer

    console = _console()
    with _PlainErrors(console):
        written = SegmentationTrainer.from_run(run, _display(console)).predict(source, target)
        console.print(f"Wrote {len(written)} label maps to {target}", highlight=False)


@app.command()
def report(run: _RunArgument) -> None:
    """Print the privacy report of a run (privacy_report.md, privacy_report.json)."""
    from rich.markdown import Markdown

    from dpkernels.segmentation.trainer import SegmentationTrainer

    console = _console()
    with _PlainErrors(console):
        console.print(Markdown(SegmentationTrainer.from_run(run).privacy_report().to_markdown()))


@app.command()
def phantom(
    folder: Annotated[Path, typer.Argument(help="Folder to create.")],
    patients: Annotated[int, typer.Option(help="Number of synthetic patients.")] = 112,
    size: Annotated[int, typer.Option(help="Voxels along the longest axis.")] = 48,
    seed: Annotated[int, typer.Option(help="Another seed gives another cohort.")] = 0,
) -> None:
    """Write the synthetic liver data set as a Medical Segmentation Decathlon folder."""
    from dpkernels.segmentation.phantom import write_phantom

    console = _console()
    with _PlainErrors(console), _display(console).counting("Writing", patients) as advance:
        write_phantom(folder, patients=patients, size=size, seed=seed, on_progress=advance)


def _privacy_changes(
    epsilon: float | None, delta: float | None, noise_multiplier: float | None, non_private: bool
) -> dict[str, Any]:
    given = [
        name
        for name, value in (
            ("--epsilon", epsilon),
            ("--noise-multiplier", noise_multiplier),
            ("--non-private", non_private or None),
        )
        if value is not None
    ]
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


_NOTHING = object()


def _preset(name: str) -> dict[str, Any]:
    from dpkernels.segmentation.presets import preset

    return {**preset(name), "preset": name}


def _stored(out: Path) -> dict[str, Any]:
    from dpkernels.segmentation.config import load_yaml
    from dpkernels.segmentation.run_folder import RunFolder

    return load_yaml(RunFolder.open(out).config)


def _configuration(
    values: dict[str, Any], config: Path | None, changes: dict[str, Any], overrides: list[str]
) -> SegmentationConfig:
    """Preset or stored run, then --config, then options, then --set."""
    from dpkernels.segmentation.config import (
        SegmentationConfig,
        load_yaml,
        merge,
        nest,
        parse_override,
    )

    layers = [load_yaml(config)] if config is not None else []
    for path, value in changes.items():
        if value is not None:
            layers.append(nest(path, None if value is _NOTHING else value))
    for layer in (*layers, *map(parse_override, overrides)):
        values = merge(values, layer)
    return SegmentationConfig.from_dict(values)


def _console() -> Console:
    from rich.console import Console

    return Console()


def _display(console: Console) -> ConsoleDisplay:
    from dpkernels.segmentation.progress import ConsoleDisplay

    return ConsoleDisplay(console)


class _PlainErrors:
    """Faults of the user's input end in one line and exit code 2, without a traceback."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, (ValueError, OSError, FloatingPointError)):
            self._console.print(
                f"Error: {error}", style="red", markup=False, highlight=False, soft_wrap=True
            )
            raise typer.Exit(2) from error
        if isinstance(error, KeyboardInterrupt):
            self._console.print("Stopped; continue with --resume --out RUN")
            raise typer.Exit(130) from error


def _metrics_table(summary: dict[str, dict[str, float]]) -> Table:
    from rich.table import Table

    table = Table(title="Held-out patients")
    for column in ("class", "Dice", "spread", "HD95, mm", "cases"):
        table.add_column(column, justify="left" if column == "class" else "right")
    for name, row in summary.items():
        table.add_row(
            name,
            _figure(row["dice"], 3),
            _figure(row["dice_std"], 3),
            _figure(row["hd95"], 1),
            str(row["cases"]),
        )
    return table


def _figure(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _print_result(console: Console, result: TrainingResult) -> None:
    console.print(_metrics_table(result.summary))
    if result.epsilon is None:
        console.print("[bold]No privacy guarantee[/] (--non-private).")
    else:
        console.print(f"[bold]epsilon {result.epsilon:.4g}[/] per patient, {result.steps} steps.")
    for name, meaning in (
        ("privacy_report.md", "what is guaranteed, in plain language"),
        ("metrics.json", "Dice and surface distance per class and case"),
        ("progress.png", "loss, epsilon and clipped share over the steps"),
        ("overlays/", "held-out scans with truth and prediction"),
        ("checkpoints/", "weights"),
    ):
        console.print(
            f"  {result.folder / name}  [dim]{meaning}[/]", highlight=False, soft_wrap=True
        )


if __name__ == "__main__":
    app()
