"""One process under DistributedDataParallel: NCCL on a GPU, gloo on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from dpkernels.engine.distributed import processes_of
from tests.engine.device.models import NETWORKS, network_of
from tests.engine.device.support import backward, private
from tests.engine.truth import relative_error

ROOT = Path(__file__).resolve().parents[3]
BACKEND = {"cpu": "gloo", "cuda": "nccl"}


def compare(folder: str, device_type: str) -> None:
    """Steps of the wrapped model and of the plain one, in a process of their own."""
    device = torch.device(device_type, 0) if device_type == "cuda" else torch.device("cpu")
    dist.init_process_group(
        BACKEND[device_type], init_method=f"file://{folder}/rendezvous", rank=0, world_size=1,
        device_id=device if device_type == "cuda" else None,
    )  # fmt: skip
    for name in NETWORKS:
        model, x = network_of(name, 9, device)
        plain = private(model, x, device, 1.0)
        backward(plain, x)
        wrapped = private(DistributedDataParallel(model.to(device)), x, device, 1.0)
        assert processes_of(wrapped.model).world_size == 1
        backward(wrapped, x)
        expected, found = plain.released(), wrapped.released()
        assert torch.equal(found.norms, expected.norms)
        for parameter, gradient in expected.gradients.items():
            assert relative_error(found.gradients[f"module.{parameter}"], gradient) < 1e-6
        wrapped.optimizer.step()
        assert len(wrapped.engine.accountant) == 1
    dist.destroy_process_group()
    print("compared", dist.is_initialized())


def test_one_process(device: torch.device, tmp_path: Path) -> None:
    if not (dist.is_nccl_available() if device.type == "cuda" else dist.is_gloo_available()):
        pytest.skip(f"PyTorch was built without {BACKEND[device.type]}")
    script = f"from {__name__} import compare; compare({str(tmp_path)!r}, {device.type!r})"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env={"GLOO_SOCKET_IFNAME": "lo", **os.environ},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "compared False" in done.stdout
