"""One run in several processes, as ``torchrun`` starts them: who samples whom, and who writes."""

from __future__ import annotations

import contextlib
import datetime
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dpkernels.training.run_folder import RunFolder

#: how long the others wait while the first process validates, evaluates and writes
_PATIENCE = datetime.timedelta(days=1)


@dataclass(frozen=True)
class TrainingProcesses:
    """This process among those of a run. Each samples its own share of the patients.

    Attributes:
        rank: its number, from 0. The first writes the run folder and the report.
        world_size: number of processes.
    """

    rank: int = 0
    world_size: int = 1

    @classmethod
    def join(cls) -> TrainingProcesses:
        """Meet the processes that torchrun started; a process started otherwise is alone."""
        if not dist.is_available():
            return cls()
        if dist.is_torchelastic_launched() and not dist.is_initialized():
            dist.init_process_group(timeout=_PATIENCE)
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls()

    @property
    def first(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def own_device(self, device: torch.device) -> torch.device:
        """Of a kind of device, the one of this process."""
        if self.world_size == 1 or device.type != "cuda" or device.index is not None:
            return device
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", self.rank)))
        torch.cuda.set_device(device)
        return device

    @contextlib.contextmanager
    def own_folder(self, folder: RunFolder, resume: bool) -> Iterator[RunFolder]:
        """The run folder for the first process; for each other one a copy, removed after the block.

        Args:
            folder: the run's.
            resume: whether there is something to copy.
        """
        if self.world_size > 1:
            dist.barrier()  # what the first process wrote before is whole
        with contextlib.ExitStack() as passing:
            if not self.first:
                place = passing.enter_context(tempfile.TemporaryDirectory(prefix="dpkernels-"))
                own = RunFolder(Path(place) / "run")
                if resume and folder.config.is_file():
                    shutil.copytree(folder.root, own.root)
                folder = own
            if self.world_size > 1:
                dist.barrier()
            yield folder

    def from_first(self, value: Any) -> Any:
        """What the first process gives, in every process."""
        if self.world_size == 1:
            return value
        shared = [value]
        dist.broadcast_object_list(shared)
        return shared[0]


#: a run in one process
ALONE = TrainingProcesses()
