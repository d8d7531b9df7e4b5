"""Runs every check of this folder in ONE pair of processes, since each start imports PyTorch.

A check is a function of nothing that both processes call; ``dist.get_rank()`` tells them apart. Its
asserts hold in each process. The first that fails ends the pair: its twin may wait for it forever.
"""

from __future__ import annotations

import datetime
import importlib
import json
import os
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

#: modules of this folder that hold checks
MODULES = ("equality", "noise", "loops", "refusals")
WORLD_SIZE = 2

Check = Callable[[], None]


def checks() -> dict[str, Check]:
    """Every function ``check_*`` of :data:`MODULES`, by "module::name"."""
    found = {}
    for module in MODULES:
        members = vars(importlib.import_module(f"tests.engine.two_processes.{module}"))
        for name, member in members.items():
            if name.startswith("check_"):
                found[f"{module}::{name.removeprefix('check_')}"] = member
    return found


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=WORLD_SIZE,
        timeout=datetime.timedelta(seconds=120),
    )
    report = Path(folder) / f"{rank}.json"
    outcomes: dict[str, str] = {}
    for name, check in checks().items():
        torch.manual_seed(0)
        try:
            check()
            dist.barrier()
            outcomes[name] = ""
        except (Exception, pytest.fail.Exception):
            outcomes[name] = f"process {rank}: {traceback.format_exc()}"
        report.write_text(json.dumps(outcomes))
        if outcomes[name]:
            os._exit(1)  # an orderly end would wait for the twin
    dist.destroy_process_group()


def run(folder: Path) -> dict[str, str]:
    """By check: what a process reports, empty where both passed; what was not reached is missing.

    Args:
        folder: an empty one, for the processes to meet in.
    """
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=_work, args=(rank, str(folder))) for rank in range(WORLD_SIZE)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(240)
        if worker.is_alive():
            worker.kill()
    reports = [folder / f"{rank}.json" for rank in range(WORLD_SIZE)]
    found = [json.loads(r.read_text()) if r.exists() else {} for r in reports]
    failed = {name: text for outcomes in found for name, text in outcomes.items() if text}
    passed = {name: "" for name in found[0] if name in found[1]}
    return {**passed, **failed}
