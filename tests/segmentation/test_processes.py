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

from dpkernels.segmentation.config import SegmentationConfig
from dpkernels.segmentation.trainer import SegmentationTrainer
from dpkernels.training.run_folder import RunFolder, load_checkpoint, steps_begun
from dpkernels.training.settings import merge
from dpkernels.training.trainer import TrainingResult
from tests.segmentation.runs import StopAfter

_save_checkpoint = RunFolder.save_checkpoint


def _slowly_saved(folder: RunFolder, name: str, state: dict) -> None:
    """The first process is still writing when the others are back to resume."""
    if folder.root.name == "two":
        time.sleep(0.5)
    _save_checkpoint(folder, name, state)


def _interrupted_and_resumed(config: SegmentationConfig, out: str | Path) -> TrainingResult:
    """A run that is stopped after two steps and resumed to its end."""
    with (
        pytest.raises(KeyboardInterrupt),
        mock.patch("dpkernels.training.trainer.SilentDisplay", side_effect=lambda: StopAfter(2)),
        mock.patch.object(RunFolder, "save_checkpoint", _slowly_saved),
    ):
        SegmentationTrainer(config, out).fit()
    return SegmentationTrainer(config, out).fit(resume=True)


def _train(rank: int, values: dict, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2,
        timeout=datetime.timedelta(seconds=120),
    )  # fmt: skip
    config = SegmentationConfig.from_dict(values)
    result = _interrupted_and_resumed(config, f"{folder}/two")
    assert result.steps == 4
    assert result.folder == Path(folder) / "two"
    plain = SegmentationConfig.from_dict(merge(values, {"privacy": {"enabled": False}}))
    with pytest.raises(ValueError, match="--non-private.*without torchrun"):
        SegmentationTrainer(plain, f"{folder}/plain").fit()
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="PyTorch was built without gloo")
def test_two_processes_train_what_one_does(tiny, tmp_path):
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
