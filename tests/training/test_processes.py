"""A run of two processes, as torchrun would start it."""

from __future__ import annotations

import datetime
import os
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

from dpkernels.training.processes import ALONE, TrainingProcesses
from dpkernels.training.run_folder import RunFolder, load_checkpoint, steps_begun
from dpkernels.training.settings import merge
from dpkernels.training.trainer import TrainingResult
from tests.training.runs import StopAfter
from tests.training.toy import ToyConfig, ToyTrainer, tiny

_save_checkpoint = RunFolder.save_checkpoint


def _slowly_saved(folder: RunFolder, name: str, state: dict) -> None:
    """The first process is still writing when the others are back to resume."""
    if folder.root.name == "two":
        time.sleep(0.5)
    _save_checkpoint(folder, name, state)


def _interrupted_and_resumed(config: ToyConfig, out: str | Path) -> TrainingResult:
    """A run that is stopped after two steps and resumed to its end."""
    with (
        pytest.raises(KeyboardInterrupt),
        mock.patch("dpkernels.training.trainer.Display", side_effect=lambda: StopAfter(2)),
        mock.patch.object(RunFolder, "save_checkpoint", _slowly_saved),
    ):
        ToyTrainer(config, out, StopAfter(2)).fit()
    return ToyTrainer(config, out).fit(resume=True)


def _train(rank: int, values: dict, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2,
        timeout=datetime.timedelta(seconds=120),
    )  # fmt: skip
    config = ToyConfig.from_dict(values)
    result = _interrupted_and_resumed(config, f"{folder}/two")
    assert result.steps == 4
    assert result.folder == Path(folder) / "two"
    plain = ToyConfig.from_dict(merge(values, {"privacy": {"enabled": False}}))
    with pytest.raises(ValueError, match="--non-private.*without torchrun"):
        ToyTrainer(plain, f"{folder}/plain").fit()
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="PyTorch was built without gloo")
def test_two_processes_train_what_one_does(tmp_path):
    config = tiny(
        {
            "data": {"test_share": 0.25, "validation_share": 0.25},
            "training": {"steps": 4, "validate_every": 2, "physical_batch_size": 1},
            "privacy": {"insecure_fixed_noise": 3},
        }
    )
    multiprocessing.spawn(_train, (config.to_dict(), str(tmp_path)), nprocs=2)
    alone = _interrupted_and_resumed(config, tmp_path / "one")

    two, one = (load_checkpoint(tmp_path / name / "checkpoints/last.pt") for name in ("two", "one"))
    assert two["update"]["accountant"] == one["update"]["accountant"]
    assert steps_begun(tmp_path / "two/checkpoints/steps.ledger") == alone.steps == 4
    for name, weights in one["model"].items():
        assert torch.allclose(two["model"][name], weights, rtol=1e-4, atol=1e-6), name
    written = {p.name for p in (tmp_path / "one").iterdir()}
    assert {p.name for p in (tmp_path / "two").iterdir()} == written


def test_a_process_that_nobody_else_started_is_alone(tmp_path):
    assert TrainingProcesses.join() == ALONE == TrainingProcesses(0, 1)
    assert ALONE.first
    folder, value = RunFolder(tmp_path / "run"), object()
    folder.root.mkdir()
    with ALONE.own_folder(folder, resume=True) as own:
        assert own is folder
    assert ALONE.from_first(value) is value
    assert folder.root.is_dir(), "the first process keeps the run folder"


def test_each_process_takes_a_device_of_its_own(monkeypatch):
    """Unless the device is no GPU, or was chosen by number."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    several, anywhere = TrainingProcesses(5, 8), torch.device("cuda")
    assert several.own_device(anywhere) == torch.device("cuda:3")
    assert chosen == [torch.device("cuda:3")]
    monkeypatch.delenv("LOCAL_RANK")
    assert several.own_device(anywhere) == torch.device("cuda:5")
    for device in (torch.device("cpu"), torch.device("cuda:1")):
        assert several.own_device(device) == device
    assert ALONE.own_device(anywhere) == anywhere
    assert len(chosen) == 2


def test_a_passing_copy_is_removed_and_the_run_folder_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(dist, "barrier", lambda: None)
    folder = RunFolder.create(tmp_path / "run")
    folder.write_yaml("config.yaml", {})

    def interrupted() -> None:
        with TrainingProcesses(1, 2).own_folder(folder, resume=True) as own:
            seen.append(own)
            assert own.root != folder.root
            assert own.config.read_text() == folder.config.read_text()
            raise KeyboardInterrupt

    seen: list[RunFolder] = []
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not seen[0].root.parent.exists()
    assert folder.config.is_file()
