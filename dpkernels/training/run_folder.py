"""The run folder: where everything of a run lies, written so that a kill leaves it readable."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import yaml


class RunFolder:
    """Paths and atomic writes of one run.

    Attributes:
        root: the folder.
        config, metrics_csv, metrics_json: files in it.
        overlays: folder of the evaluation's pictures.
        checkpoints: folder of the three files that follow.
        last, average: weights after the last step, and averaged ones.
        ledger: the steps begun.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.config = self.root / "config.yaml"
        self.metrics_csv = self.root / "metrics.csv"
        self.metrics_json = self.root / "metrics.json"
        self.overlays = self.root / "overlays"
        self.checkpoints = self.root / "checkpoints"
        self.last = self.checkpoints / "last.pt"
        self.average = self.checkpoints / "ema.pt"
        self.ledger = self.checkpoints / "steps.ledger"

    @classmethod
    def create(cls, root: str | Path) -> RunFolder:
        """A folder for a new run.

        A run that failed before its first step may be overwritten.

        Raises:
            ValueError: it holds a run that took steps, or cannot be written.
        """
        folder = cls(root)
        if folder.ledger.exists() and folder.ledger.stat().st_size:
            raise ValueError(
                f"--out: {folder.root} holds a run that took steps; continue it with --resume, "
                "or choose another folder"
            )
        with _naming(folder.root):
            for part in (folder.root, folder.checkpoints, folder.overlays):
                part.mkdir(parents=True, exist_ok=True)
        return folder

    @classmethod
    def open(cls, root: str | Path) -> RunFolder:
        """The folder of an existing run.

        Raises:
            ValueError: there is no run in it.
        """
        folder = cls(root)
        if not folder.config.is_file():
            raise ValueError(
                f"{folder.root} is not a run folder: it has no config.yaml. Pass the folder that "
                "`train` printed"
            )
        return folder

    def check_writable(self) -> None:
        """Find out before the work starts whether its results can be kept.

        Raises:
            ValueError: a file system mounted read-only, or missing permission.
        """
        for part in (self.root, self.checkpoints):
            with _naming(part), tempfile.TemporaryFile(dir=part):
                pass

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep other processes from training in the folder during the block; a kill ends it too.

        Raises:
            ValueError: one is training in it.
        """
        with (self.root / ".lock").open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"--out: another process is training in {self.root}; wait for it, or choose "
                    "another folder"
                ) from None
            except OSError:
                pass  # a file system without locks
            yield

    def clear_overlays(self) -> None:
        """Make room for the pictures of a new evaluation."""
        self.overlays.mkdir(exist_ok=True)
        for picture in self.overlays.glob("*.png"):
            picture.unlink()

    def write_yaml(self, name: str, values: dict[str, Any]) -> None:
        """Write a mapping as YAML, atomically."""
        self.write_text(name, yaml.safe_dump(values, sort_keys=False))

    def write_json(self, name: str, values: Any) -> None:
        """Write plain values as JSON, atomically; NaN and infinities become null."""
        finite = json.loads(json.dumps(values), parse_constant=lambda _: None)
        self.write_text(name, json.dumps(finite, indent=1) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write text, atomically."""
        with atomic(self.root / name) as path:
            path.write_text(text)

    def read_json(self, name: str) -> Any:
        """Read what `write_json` wrote."""
        return json.loads((self.root / name).read_text())

    def save_checkpoint(self, name: str, state: dict[str, Any]) -> None:
        """Write `checkpoints/name`; the previous one stays whole until the new one is on disk.

        Raises:
            OSError: the disk is full or read-only; the previous checkpoint is untouched.
        """
        try:
            with atomic(self.checkpoints / name) as path:
                torch.save(state, path)
        except (OSError, RuntimeError) as error:
            raise OSError(
                f"cannot write {self.checkpoints / name}: {error}. The previous checkpoint is "
                "whole; make room and continue with --resume"
            ) from error


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; only tensors and plain values are unpickled.

    Raises:
        ValueError: no such file, or not a checkpoint of this trainer.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such checkpoint")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path}: not a readable checkpoint: {error}") from None
    if not isinstance(state, dict) or "model" not in state:
        raise ValueError(f"{path}: expected a checkpoint that `train` wrote")
    return state


def steps_begun(ledger: Path) -> int:
    """Steps entered in a ledger; a line cut short by a kill or a full disk counts."""
    return len(ledger.read_bytes().split()) if ledger.exists() else 0


class StepLedger:
    """An append-only count of the steps that were begun.

    A step is entered before its batch is drawn. After a kill the ledger holds every step that was
    taken since the last checkpoint, so that none is taken without being counted.
    """

    def __init__(self, path: Path) -> None:
        self.count = steps_begun(path)
        self._file = path.open("ab", buffering=0)
        if self.count and not path.read_bytes().endswith(b"\n"):
            self._file.write(b"\n")

    def begin(self) -> int:
        """Enter one more step and return its number, from 1.

        Raises:
            OSError: the disk is full or read-only; the step must not be taken.
        """
        self.count += 1
        try:
            self._file.write(b"%d\n" % self.count)
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OSError(
                f"cannot write {self._file.name}: {error}. Step {self.count} was not taken, and "
                "the last checkpoint is whole; make room and continue with --resume"
            ) from error
        return self.count

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@contextlib.contextmanager
def _naming(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"run folder: cannot write to {folder}: {error}. Choose one that can be written"
        ) from None


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path that replaces `path` once it is completely on disk.

    Raises:
        OSError: it cannot be written; a full disk alone would not say which file it was.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and machine, for `env.json`."""
    from importlib.metadata import PackageNotFoundError, version

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    packages = ("dpkernels", "torch", "opacus", "monai", "nibabel", "numpy", "scipy")
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "gpu": gpu,
        "packages": {name: installed(name) for name in packages},
    }
