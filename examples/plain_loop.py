"""The usual Opacus loop; only the import differs.

python examples/plain_loop.py
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dpkernels import PrivacyEngine


def main(epochs: int = 3) -> float:
    """Train a small classifier on synthetic data; returns its accuracy on the training set."""
    torch.manual_seed(0)
    x = torch.randn(2000, 20)
    y = (x[:, :10].sum(1) > 0).long()
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 2))
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
        for inputs, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
    with torch.no_grad():
        accuracy = float((model(x).argmax(1) == y).float().mean())
    print(f"accuracy {accuracy:.2f}, epsilon {engine.get_epsilon(1e-5):.2f} at delta 1e-5")
    print(engine.explain())
    return accuracy


if __name__ == "__main__":
    main()
