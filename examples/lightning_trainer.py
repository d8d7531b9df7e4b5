"""Lightning with automatic optimization: make the network private, return its optimizer.

    pip install lightning
    python examples/lightning_trainer.py

The network stays the user's (``wrap_model=False``). Leave ``accumulate_grad_batches`` at 1, clip
nothing in the trainer, and use ``precision="bf16-mixed"`` rather than 16-mixed on a GPU.
"""

from __future__ import annotations

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dpkernels import PrivacyEngine


class Classifier(lightning.LightningModule):
    """An ordinary Lightning module; the private optimizer comes from outside."""

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer):
        super().__init__()
        self.network = network
        self.optimizer = optimizer

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], _: int) -> torch.Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.network(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer


def main(epochs: int = 2) -> PrivacyEngine:
    """Train on synthetic data; returns the engine that counted the steps."""
    lightning.seed_everything(0, verbose=False)
    x = torch.randn(512, 20)
    y = (x[:, :10].sum(1) > 0).long()
    network = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 2))
    engine = PrivacyEngine()
    _, optimizer, loader = engine.make_private(
        module=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.5),
        data_loader=DataLoader(TensorDataset(x, y), batch_size=64),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        wrap_model=False,
    )
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="auto", devices=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Classifier(network, optimizer), loader)
    print(f"epsilon {engine.get_epsilon(1e-5):.2f} at delta 1e-5")
    return engine


if __name__ == "__main__":
    main()
