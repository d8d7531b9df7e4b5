"""Several processes: the model in DDP (or ``--fsdp``), the rest is the plain loop.

    torchrun --nproc-per-node 2 examples/ddp.py

Every process passes the whole dataset; the private loader deals its records out. The batch size is
that of all processes together. Physical batches (``BatchMemoryManager``) need nothing else either.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from dpkernels import PrivacyEngine


def main(epochs: int = 3, fsdp: bool = False) -> tuple[float, PrivacyEngine]:
    """Train in this process group; returns the accuracy on the training set and the engine."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", dist.get_rank() % torch.cuda.device_count())
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    x = torch.randn(2000, 20)
    y = (x[:, :10].sum(1) > 0).long()
    model: nn.Module = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 2)).to(device)
    model = fully_shard(model) if fsdp else DistributedDataParallel(model)
    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.5),
        data_loader=DataLoader(TensorDataset(x, y), batch_size=200),
        target_epsilon=8.0,
        target_delta=1e-5,
        epochs=epochs,
        max_grad_norm=1.0,
    )
    for _ in range(epochs):
        with BatchMemoryManager(
            data_loader=loader, max_physical_batch_size=64, optimizer=optimizer
        ) as physical:
            for inputs, labels in physical:
                optimizer.zero_grad()
                output = model(inputs.to(device))
                nn.functional.cross_entropy(output, labels.to(device)).backward()
                optimizer.step()
    with torch.no_grad():
        accuracy = float((model(x.to(device)).argmax(1).cpu() == y).float().mean())
    if dist.get_rank() == 0:
        print(f"accuracy {accuracy:.2f}, epsilon {engine.get_epsilon(1e-5):.2f} at delta 1e-5")
    return accuracy, engine


if __name__ == "__main__":
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    main(fsdp="--fsdp" in sys.argv)
    dist.destroy_process_group()
