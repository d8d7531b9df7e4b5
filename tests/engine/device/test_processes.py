"""One process under DistributedDataParallel: NCCL on a GPU, gloo on a CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from opacus.optimizers import DistributedDPOptimizer
from torch.nn.parallel import DistributedDataParallel

from tests.engine.device.models import NETWORKS, network_of
from tests.engine.device.support import backward, private
from tests.engine.truth import relative_error

ROOT = Path(__file__).resolve().parents[3]
BACKEND = {"cpu": "gloo", "cuda": "nccl"}


def compare(folder: str, device_type: str) -> None:
    """Steps of the wrapped model and of the plain one, in a group of this process alone."""
    device = torch.device("cpu") if device_type == "cpu" else torch.device(device_type, 0)
    dist.init_process_group(
        BACKEND[device_type], init_method=f"file://{folder}/rendezvous", rank=0, world_size=1,
        device_id=None if device_type == "cpu" else device,
    )  # fmt: skip
    try:
        for name in NETWORKS:
            model, x = network_of(name, 9, device)
            plain = private(model, x, device, 1.0)
            backward(plain, x)
            wrapped = private(DistributedDataParallel(model.to(device)), x, device, 1.0)
            assert isinstance(wrapped.optimizer, DistributedDPOptimizer)
            backward(wrapped, x)
            expected, found = plain.released(), wrapped.released()
            assert torch.equal(found.norms, expected.norms)
            for parameter, gradient in expected.gradients.items():
                assert relative_error(found.gradients[f"module.{parameter}"], gradient) < 1e-6
            wrapped.optimizer.step()
            assert len(wrapped.engine.accountant) == 1
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="PyTorch was built without gloo")
def test_gloo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    compare(str(tmp_path), "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not dist.is_nccl_available(), reason="PyTorch was built without NCCL")
def test_nccl(tmp_path: Path) -> None:
    """In a process of its own: a communicator that hangs is ended with it."""
    script = f"from {__name__} import compare; compare({str(tmp_path)!r}, 'cuda')"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr[-3000:]
