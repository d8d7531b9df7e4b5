"""The command line of a task: train, evaluate, predict, report, attack, study. Loads no torch.

The annotations of a command hold help texts of its task, so they are evaluated where they stand:
this module does without `from __future__ import annotations`.
"""

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dpkernels.study import options as comparing
from dpkernels.training import options
from dpkernels.training.task import Prediction, Task

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from dpkernels.training.trainer import Trainer

_TRAIN = "Train, evaluate and report; everything lands in one run folder."
_EVALUATE = "Evaluate a run again on its held-out {subjects} (metrics.json, overlays/)."
_REPORT = "Print the privacy report of a run (privacy_report.md, privacy_report.json)."
_ATTACK = """Attack a run: rebuild its training {subjects} from the gradients it would release.

Uses the run's own data, clipping bound and noise. Writes attack/attack.json and
attack/reconstructions.png into the run folder, and prints how near each attack comes: the
correlation (NCC) of reconstruction and {record}, beside what pure noise reaches."""
_STUDY = """Train at several budgets, attack each run, and put utility beside risk.

Writes report.html (open it first), table.csv, table.md, grid.png and curves.png. Stopped or
killed, it goes on when it is started again with the same --out; more budgets and seeds can be
added that way too."""


def command_line(task: Task) -> typer.Typer:
    """The commands of a task; the task may add commands of its own to them."""
    app = typer.Typer(help=task.help, no_args_is_help=True)
    commands = [(_TRAIN, _train(task)), (_EVALUATE, _evaluate(task))]
    if task.prediction is not None:
        commands.append((task.prediction.help, _predict(task, task.prediction)))
    commands += [(_REPORT, _report(task)), (_ATTACK, _attack(task)), (_STUDY, _study(task))]
    for text, command in commands:
        app.command(help=task.help_of(command.__name__, text))(command)
    return app


def _train(task: Task) -> Callable[..., None]:
    preset_help = f"Named starting point: {task.presets_from(task.presets[0])}."

    def train(
        *,
        data: Annotated[Path | None, typer.Option(help=task.data)] = None,
        preset: Annotated[str, typer.Option(help=preset_help)] = task.presets[0],
        epsilon: options.Epsilon = None,
        delta: options.Delta = None,
        noise_multiplier: options.NoiseMultiplier = None,
        insecure_fixed_noise: options.InsecureFixedNoise = None,
        non_private: options.NonPrivate = False,
        config: options.ConfigFile = None,
        override: options.Override = None,
        steps: options.Steps = None,
        patients_csv: Annotated[Path | None, typer.Option("--patients", help=task.patients)] = None,
        seed: options.Seed = None,
        device: options.Device = None,
        out: options.Out = None,
        resume: options.Resume = False,
        **more: str | None,
    ) -> None:
        with options.terminal(options.RESUME) as console:
            kind = task.trainer()
            own = {
                s.path: s.read(text) for s in task.settings if (text := more[s.name]) is not None
            }
            start = options.configuration(
                kind.config_class,
                preset=preset,
                out=out,
                resume=resume,
                config=config,
                changes={
                    **options.common_changes(
                        data=data, patients_csv=patients_csv, steps=steps, device=device
                    ),
                    **own,
                    "training.seed": seed,
                    "privacy.insecure_fixed_noise": insecure_fixed_noise,
                    **options.privacy_changes(epsilon, delta, noise_multiplier, non_private),
                },
                overrides=override or [],
            )
            trainer = kind(start, out, options.display(console))
            console.print(f"Run folder: [bold]{trainer.folder.root}[/]", highlight=False)
            result = trainer.fit(resume=resume)
            console.print(_results(task, result.summary))
            options.print_outcome(console, result, trainer.plan().unit, task.files)

    return _with_settings(train, task)


def _with_settings(train: Callable[..., None], task: Task) -> Callable[..., None]:
    """The command with one option for each of the task's own settings in the place of **more."""
    signature = inspect.signature(train)
    shared = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    own = [
        inspect.Parameter(
            setting.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[str | None, typer.Option(help=setting.help)],
        )
        for setting in task.settings
    ]
    train.__signature__ = signature.replace(parameters=[*shared, *own])  # type: ignore[attr-defined]
    return train


@contextlib.contextmanager
def _opened(task: Task, run: Path) -> Iterator[tuple["Console", "Trainer"]]:
    """The terminal and the trainer of a run."""
    with options.terminal() as console:
        yield console, task.trainer().from_run(run, options.display(console))


def _evaluate(task: Task) -> Callable[..., None]:
    def evaluate(run: options.Run) -> None:
        with _opened(task, run) as (console, trainer):
            trainer.evaluate()
            console.print(_results(task, trainer.folder.read_json("metrics.json")["summary"]))

    return evaluate


def _predict(task: Task, words: Prediction) -> Callable[..., None]:
    def predict(
        run: options.Run,
        source: Annotated[Path, typer.Argument(metavar="IN", help=words.source)],
        target: Annotated[Path, typer.Argument(metavar="OUT", help=words.target)],
    ) -> None:
        with _opened(task, run) as (console, trainer):
            count = len(trainer.predict(source, target))
            console.print(f"Wrote {count} {words.written} to {target}", highlight=False)

    return predict


def _report(task: Task) -> Callable[..., None]:
    def report(run: options.Run) -> None:
        with _opened(task, run) as (console, trainer):
            options.print_report(console, trainer)

    return report


def _attack(task: Task) -> Callable[..., None]:
    def attack(
        run: options.Run,
        attacks: comparing.Attacks = comparing.ATTACKS,
        patients: comparing.Attacked = 8,
    ) -> None:
        from dpkernels.study import commands

        with options.terminal() as console:  # one bar only: the trainer shows nothing
            commands.attack(
                console, task.trainer().from_run(run), comparing.names(attacks), patients
            )

    return attack


def _study(task: Task) -> Callable[..., None]:
    first = task.study_preset or task.presets[0]
    preset_help = f"Starting point: {task.presets_from(first)}."

    def study(
        epsilons: comparing.Epsilons = comparing.BUDGETS,
        accountant: comparing.Accountant = "rdp",
        seeds: comparing.Seeds = 1,
        data: Annotated[Path | None, typer.Option(help=task.data)] = None,
        patients_csv: Annotated[Path | None, typer.Option("--patients", help=task.patients)] = None,
        preset: Annotated[str, typer.Option(help=preset_help)] = first,
        config: options.ConfigFile = None,
        override: options.Override = None,
        steps: options.Steps = None,
        device: options.Device = None,
        attacks: comparing.Attacks = comparing.ATTACKS,
        attacked: comparing.Attacked = 8,
        out: comparing.StudyOut = Path(task.study_out),
        dry_run: comparing.DryRun = False,
    ) -> None:
        from dpkernels.study import commands
        from dpkernels.study.runner import Study, StudySettings

        with options.terminal(options.AGAIN) as console:
            kind = task.trainer()
            start = options.configuration(
                kind.config_class,
                preset=preset,
                config=config,
                changes=options.common_changes(
                    data=data, patients_csv=patients_csv, steps=steps, device=device
                ),
                overrides=override or [],
            )
            settings = StudySettings(
                comparing.budgets(epsilons), accountant, seeds, attacked, comparing.names(attacks)
            )
            commands.study(console, Study(kind, start, settings, out, console), dry_run)

    return study


def _results(task: Task, summary: Mapping[str, Mapping[str, float | None]]) -> "Table":
    from rich.table import Table

    table = Table("class", title=f"Held-out {task.subjects}")
    for title in task.columns:
        table.add_column(title, justify="right")
    for name, row in summary.items():
        cells = [_figure(row.get(key), digits) for key, digits in task.columns.values()]
        table.add_row(name, *cells)
    return table


def _figure(value: float | None, digits: str) -> str:
    return "-" if value is None or math.isnan(value) else format(value, digits)
