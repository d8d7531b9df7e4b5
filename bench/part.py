"""A part of the bench: what it measures, the rows that come of it, and its command.

A part is a list of items. Each item yields its rows, which are written into the part's file as they
come, in the place of former rows with the same key; :mod:`bench.work` remembers finished items.
"""

from __future__ import annotations

import inspect
import json
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bench import results, table, timing, work

Row = Mapping[str, object]
#: measures one item; rows that are yielded together are written together
Item = Callable[[work.Report], Iterable[Sequence[Row]]]
#: what rows of a file say
Lines = Callable[[list[dict[str, str]]], list[str]]

Only = Annotated[list[str] | None, typer.Option(help="Only this case (repeatable).")]


@dataclass(frozen=True)
class How:
    """How a run of a part is asked to go.

    Attributes:
        output: CSV file to update.
        allocator: stated in the rows: ``system``, or ``kept`` where freed memory stays with the
            process.
        fresh, budget, piece_seconds: as for :func:`bench.work.off`.
        only_show: measure nothing.
    """

    output: Path
    device: torch.device = timing.CPU
    threads: int = 1
    allocator: str = "system"
    fresh: bool = False
    budget: float | None = None
    piece_seconds: float | None = None
    only_show: bool = False

    def here(self) -> dict[str, Any]:
        """Where and with what the rows of the run are measured, by column."""
        return results.environment(self.device, self.allocator)


@dataclass(frozen=True)
class Todo:
    """What a run has to do.

    Attributes:
        items: by name, in order.
        how: the part's command may change what it was asked.
        lost: (item, status) -> rows of an item that has ended a process before its first piece.
        show: prints what was found, in the place of the part's digest.
    """

    items: Mapping[str, Item]
    how: How
    lost: Callable[[str, str], Sequence[Row]] = lambda item, status: ()
    show: Callable[[], None] | None = None


@dataclass(frozen=True)
class Part:
    """A part and its command, ``python -m bench NAME``.

    Attributes:
        what: a line about it.
        key: columns that tell its rows apart.
        todo: (how, own options) -> what is to be done; the own options are those of the command.

            Raises ValueError where an option has no such value.
        within: former rows that agree with a new one in these columns go, too.
        seconds: about how long it takes in ``all``, on a quiet core; None: not part of it.
        arguments: of its command in ``all``.
        digest: rows -> what they say, a line each, for a terminal and the notes.
        tables: rows -> tables for the notes.
        headline: whether the first line of its digest stands in the README.
        on_gpu: whether it runs on a GPU, too.
        may_leave: whether a run that leaves items to the next one for want of time ends well.
    """

    name: str
    what: str
    key: tuple[str, ...]
    todo: Callable[..., Todo]
    within: tuple[str, ...] = ()
    seconds: float | None = None
    arguments: tuple[str, ...] = ()
    digest: Lines = lambda rows: []
    tables: Lines = lambda rows: []
    headline: bool = False
    on_gpu: bool = False
    may_leave: bool = False

    @property
    def path(self) -> Path:
        """Its committed rows."""
        return results.RESULTS / f"{self.name}.csv"

    def said(self, by: Lines, path: Path | None = None) -> list[str]:
        """What the rows of a file say, its committed ones by default; nothing without rows."""
        rows = table.read(path or self.path)
        return by(rows) if rows else []

    def run(self, todo: Todo, options: Mapping[str, object] | None = None) -> work.Outcome:
        """Measure what an earlier run with these options, at this commit, has not.

        Raises:
            SystemExit: as :func:`bench.work.off`.
        """
        how = todo.how
        torch.set_num_threads(how.threads)
        timing.allow_tf32(False)
        warnings.simplefilter("ignore")
        here = how.here()

        def write(rows: Sequence[Row]) -> None:
            if rows:
                table.replace(how.output, [{**row, **here} for row in rows], self.key, self.within)

        def measure(item: Item, report: work.Report) -> None:
            for rows in item(report):
                write(rows)

        same = replace(how, fresh=False, budget=None, piece_seconds=None)
        settings = {"items": list(todo.items), **asdict(same), **(options or {})}
        words = json.dumps(settings, default=str)
        return work.off(
            {name: partial(measure, item) for name, item in todo.items.items()},
            f"{self.name}-{zlib.crc32(words.encode()):08x}",
            json.loads(words),
            fresh=how.fresh,
            budget=how.budget,
            piece_seconds=how.piece_seconds,
            lost=lambda item, status: write(todo.lost(item, status)),
        )

    def show(self, todo: Todo) -> None:
        """Print what the rows say that a run has written or updated."""
        if todo.show is not None:
            todo.show()
        else:
            work.say(*self.said(self.digest, todo.how.output))

    def command(self, then: Callable[[Path], None]) -> Callable[..., None]:
        """The function that is its command: own options, then those of every part.

        Args:
            then: called with the file whose rows are new.
        """
        own = _parameters(self.todo)[1:]
        shared = [p for p in _parameters(_asked)[1:] if self.on_gpu or p.name not in _OF_A_GPU]

        def run(**given: Any) -> None:
            options = {parameter.name: given.pop(parameter.name) for parameter in own}
            try:
                todo = self.todo(_asked(self, **given), **options)
            except ValueError as error:
                raise typer.BadParameter(str(error)) from None
            outcome = work.Outcome() if todo.how.only_show else self.run(todo, options)
            self.show(todo)
            if not todo.how.only_show:
                then(todo.how.output)
            if outcome.failed or outcome.ended or (outcome.left and not self.may_leave):
                raise typer.Exit(1)

        parameters = [*own, *shared]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run


def _asked(
    part: Part,
    output: Annotated[Path | None, typer.Option(help="CSV to update.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    budget: Annotated[
        float | None,
        typer.Option(help="Seconds after which nothing more is begun; repeat to go on."),
    ] = None,
    item_seconds: Annotated[
        float | None,
        typer.Option(
            help=f"Seconds after which a rival or case under way ends the process with {work.HUNG};"
            f" default: {work.PIECE_SECONDS_ON_GPU:.0f} on a GPU."
        ),
    ] = None,
    fresh: Annotated[bool, typer.Option(help="Do not go on with an interrupted run.")] = False,
    show: Annotated[bool, typer.Option(help="Only print what the rows say.")] = False,
) -> How:
    """What the options that all commands share ask for; `output` is the part's file by default.

    Raises:
        ValueError: no such device here.
    """
    where = results.usable(device)
    if item_seconds is None and where.type == "cuda":
        item_seconds = work.PIECE_SECONDS_ON_GPU
    return How(
        output=output or part.path,
        device=where,
        fresh=fresh,
        budget=budget,
        piece_seconds=item_seconds,
        only_show=show,
    )


_OF_A_GPU = ("device", "item_seconds")


def _parameters(function: Callable[..., object]) -> list[inspect.Parameter]:
    return list(inspect.signature(function, eval_str=True).parameters.values())
