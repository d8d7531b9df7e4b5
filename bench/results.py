"""Rows of measurements: what a row states, and how a rerun replaces its own."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from bench import table

#: columns that tell rows apart
KEY = ("device", "threads", "allocator", "case", "rival")
RESULTS = Path(__file__).resolve().parent / "results"
_ROOT = RESULTS.parents[1]


def environment(device: torch.device, allocator: str) -> dict[str, Any]:
    """Where and with what this process measures, by column; `allocator` as in :class:`Row`."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "cpu": f"{_cpu_model()}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "allocator": allocator,
        "tf32": ("on" if torch.backends.cuda.matmul.allow_tf32 else "off") if on_gpu else "",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


@dataclass(frozen=True)
class Row:
    """One rival on one case.

    Attributes:
        status: ``ok``, or why there are no figures.
        gate_error: largest relative error of a parameter's clipped gradient against the loop in
            float64 (bfloat16 cases: of a float32 step against the loop in float32).
        ms: median wall time of a step; ``ms_p20`` and ``ms_p80`` its 20th and 80th percentile.
        ratio: median over rounds of this step's time over the ordinary step's in the same round.
        processor_ratio: the same in processor time, which other work on the machine distorts
            less; empty on a GPU. Likewise ``processor_ms``, ``processor_p20``, ``processor_p80``.
        host_ms: median time until Python has returned from a step, on a GPU: as much as ``ms``
            where launches, or waits for the GPU, bound the step.
        busy: share of ``ms`` in which the GPU is at work: the time that the profiler sees it busy
            in a step of another row, over ``ms``; empty where it was not profiled.
        memory_mb: peak growth during the step, MB (1e6 bytes).
        memory_ratio: over the ordinary step's.
        allocator: ``system``, or ``kept`` where freed memory stays with the process.
        load: running processes per core (load average) when the case began.
    """

    case: str
    rival: str
    status: str
    batch: int
    parameters: int
    precision: str
    config: str
    version: str
    gate_error: float | None = None
    ms: float | None = None
    ms_p20: float | None = None
    ms_p80: float | None = None
    ratio: float | None = None
    ratio_p20: float | None = None
    ratio_p80: float | None = None
    processor_ms: float | None = None
    processor_ratio: float | None = None
    processor_p20: float | None = None
    processor_p80: float | None = None
    host_ms: float | None = None
    busy: float | None = None
    rounds: int = 0
    memory_mb: float | None = None
    memory_ratio: float | None = None
    load: float | None = None
    device: str = ""
    cpu: str = ""
    threads: int = 0
    allocator: str = "system"
    tf32: str = ""
    python: str = ""
    torch: str = ""
    commit: str = ""
    date: str = ""

    @property
    def best_ratio(self) -> float | None:
        """What tables show: processor time on one thread of the CPU, else wall time."""
        return self.processor_ratio if self.by_processor else self.ratio

    @property
    def best_ms(self) -> float | None:
        """Likewise, milliseconds."""
        return self.processor_ms if self.by_processor else self.ms

    @property
    def by_processor(self) -> bool:
        """Whether tables show processor time; that of several threads would hide their waiting."""
        return self.threads == 1 and self.processor_ratio is not None

    @property
    def key(self) -> tuple[str, ...]:
        """What a rerun replaces: same case, rival, device, threads and allocator."""
        return tuple(str(getattr(self, column)) for column in KEY)

    def measured_on(self, place: Mapping[str, Any]) -> bool:
        """Whether device, threads and allocator are those of an :func:`environment`."""
        return self.key[:3] == tuple(str(place[column]) for column in KEY[:3])


_TYPES = {f.name: str(f.type) for f in fields(Row)}


def read(path: Path) -> list[Row]:
    """Rows of a CSV file; none where there is no file."""
    return [
        Row(**{name: _parse(name, text) for name, text in line.items() if name in _TYPES})
        for line in table.read(path)
    ]


def _parse(name: str, text: str) -> object:
    kind = _TYPES[name]
    if kind.startswith("float"):
        return float(text) if text else None
    return int(text or 0) if kind == "int" else text


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def usable(name: str) -> torch.device:
    """The device of this name.

    Raises:
        ValueError: it names no device, or a GPU where there is none that torch can use.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r}: torch {torch.__version__} finds no GPU here")
    return device


def version_of(package: str) -> str:
    """Version of an installed distribution; empty where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def commit() -> str:
    """Short hash of the checkout, with ``+`` where what is measured differs from it.

    The environment variable ``DPKERNELS_COMMIT`` says it where the checkout travels without
    ``.git``; without either it is ``unknown``.
    """
    if named := os.environ.get("DPKERNELS_COMMIT"):
        return named
    measured = ["dpkernels", "csrc", "bench/*.py"]
    try:
        head = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", *measured)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed else "")


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(_ROOT), *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()
