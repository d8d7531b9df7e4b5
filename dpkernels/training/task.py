"""A task as data: what its command line says of it and how it is trained. Light: loads no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from dpkernels.training.trainer import Trainer


class Prediction(NamedTuple):
    """The command `predict`: its help, that of IN and of OUT, and what it writes, in the plural."""

    help: str
    source: str
    target: str
    written: str


@dataclass(frozen=True)
class Setting:
    """An option of `train` that only this task has.

    Attributes:
        name: of the option, without dashes.
        path: of the setting, such as "data.positive".
        help: of the option.
        read: from the option's text to the value of the setting.
    """

    name: str
    path: str
    help: str
    read: Callable[[str], Any] = str


@dataclass(frozen=True)
class Task:
    """A kind of training, with the commands train, evaluate, report, attack, study and predict.

    Attributes:
        name: of its command, below `dpkernels`.
        help: of the command: what it does, how to start, which data it reads.
        trainer: imports and returns the class of its trainer.
        presets: named starting points, the default of `train` first.
        record: what one item of the data is called: "scan", "image".
        columns: of the table of results: title to key in a summary's row, and number format.
        data: help of --data.
        subjects: who is held out and attacked, in the plural: "patients", "images".
        metrics: what metrics.json holds.
        examples: command lines without "dpkernels" and the task's name, by command.
        study_preset: default of `study`; "": that of `train`.
        study_out: default folder of `study`.
        prediction: None: the task has no command `predict`.
        settings: options of `train` that only this task has.
    """

    name: str
    help: str
    trainer: Callable[[], type[Trainer]]
    presets: Sequence[str]
    record: str
    columns: Mapping[str, tuple[str, str]]
    data: str
    subjects: str = "patients"
    metrics: str = "every metric"
    examples: Mapping[str, Sequence[str]] = field(default_factory=dict)
    study_preset: str = ""
    study_out: str = "runs/study"
    prediction: Prediction | None = None
    settings: Sequence[Setting] = ()

    @property
    def files(self) -> dict[str, str]:
        """What its evaluation writes, with its meaning."""
        return {
            "metrics.json": self.metrics,
            "overlays/": f"held-out {self.record}s with truth and prediction",
        }

    @property
    def patients(self) -> str:
        """Help of --patients."""
        record = self.record
        return f"CSV with columns {record},patient_id when patients have several {record}s."

    def presets_from(self, first: str) -> str:
        """The names of the presets, `first` first, separated by commas."""
        return ", ".join([first, *[name for name in self.presets if name != first]])

    def help_of(self, command: str, text: str) -> str:
        """Help of a command: its text in this task's words, and its examples."""
        lines = [f"  dpkernels {self.name} {line}" for line in self.examples.get(command, ())]
        title = ["Examples:"] if lines else []
        words = text.format(subjects=self.subjects, record=self.record)
        return "\n\n".join([words, *title, *lines])
