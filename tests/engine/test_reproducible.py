"""The same inputs and the same key give the same bits; no part of a key stream is used twice."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dpkernels import PrivacyEngine, ops
from dpkernels.engine.release import secure
from dpkernels.ops.noise import NoiseSource, blocks_needed
from tests.engine.support import squared_loss, values

X = values(5, 2, 8, 8).float()
IDS = torch.randint(0, 11, (5, 6), generator=torch.Generator().manual_seed(3))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2),
        nn.Flatten(), nn.Linear(36, 5),
    )  # fmt: skip


def sequential() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Embedding(11, 8, padding_idx=2), layer, nn.LSTM(8, 4, batch_first=True))


CASES: dict[str, tuple[Callable[[], nn.Module], torch.Tensor]] = {
    "convolutional": (convolutional, X),
    "sequential": (sequential, IDS),
}


def released(name: str, secure_mode: bool) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Gradients with noise, and norms."""
    torch.manual_seed(0)
    build, x = CASES[name]
    model = build()
    wrapped, optimizer, _ = PrivacyEngine(secure_mode=secure_mode).make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(x), batch_size=len(x)), noise_multiplier=1.0,
        max_grad_norm=1.0,
    )  # fmt: skip
    squared_loss(wrapped, (x,)).backward()
    return [p.grad for p in model.parameters()], optimizer.last_step.per_sample_norm


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("secure_mode", [False, True])
def test_same_bits_twice(name: str, secure_mode: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def fixed(self: NoiseSource) -> None:
        self._key, self._next_block = torch.tensor([5, 6, 7, 8]), 0

    other, norms_alike = released(name, secure_mode)
    monkeypatch.setattr(NoiseSource, "_draw_key", fixed)
    gradients, norms = released(name, secure_mode)
    again, norms_again = released(name, secure_mode)
    assert torch.equal(norms, norms_again)
    assert torch.equal(norms, norms_alike)
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(gradients, other, strict=True))


class Ledger:
    """Every range of blocks that noise was drawn from, by key."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.ranges: list[tuple[tuple[int, ...], int, int]] = []
        finish, add = ops.finish_grads_, ops.gaussian_noise_
        integers = secure.discrete_gaussian_noise_

        def finish_grads_(outs: Any, grads: Any, factors: Any, std: float, *rest: Any) -> Any:
            _, key, blocks, _ = rest
            for out, block in zip(outs, blocks, strict=True):
                self.drawn(key, block, blocks_needed(out.numel()) if std else 0)
            return finish(outs, grads, factors, std, *rest)

        def gaussian_noise_(tensor: torch.Tensor, std: float, key: torch.Tensor, block: int) -> Any:
            self.drawn(key, block, blocks_needed(tensor.numel()) if std else 0)
            return add(tensor, std, key, block)

        def discrete(tensor: torch.Tensor, key: torch.Tensor, block: int) -> Any:
            self.drawn(key, block, tensor.numel())
            return integers(tensor, key, block)

        monkeypatch.setattr(ops, "finish_grads_", finish_grads_)
        monkeypatch.setattr(ops, "gaussian_noise_", gaussian_noise_)
        monkeypatch.setattr(secure, "discrete_gaussian_noise_", discrete)

    def drawn(self, key: torch.Tensor, block: int, count: int) -> None:
        if count:
            self.ranges.append((tuple(key.tolist()), block, block + count))

    def reused(self) -> bool:
        ordered = sorted(self.ranges)
        return any(a[0] == b[0] and b[1] < a[2] for a, b in itertools.pairwise(ordered))


def train(model: nn.Module, optimizer: Any, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        optimizer.signal_skip_step(True)
        squared_loss(model, (X[:2],)).backward()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.signal_skip_step(False)
        squared_loss(model, (X[2:],)).backward()
        squared_loss(model, (X[:3],)).backward()
        optimizer.step()
    optimizer.zero_grad()
    optimizer.make_private_noise_only()
    optimizer.step()


ADAPTIVE = {
    "clipping": "adaptive", "target_unclipped_quantile": 0.5, "clipbound_learning_rate": 0.2,
    "max_clipbound": 10.0, "min_clipbound": 0.1, "unclipped_num_std": 2.0,
}  # fmt: skip


@pytest.mark.parametrize("arguments", [{}, ADAPTIVE, None], ids=["flat", "adaptive", "secure"])
def test_no_block_is_used_twice_by_training_resuming_and_copies(
    arguments: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Physical batches, accumulation, noise-only steps, a checkpoint resumed twice, a deepcopy."""
    ledger = Ledger(monkeypatch)

    def made() -> tuple[PrivacyEngine, nn.Module, Any]:
        model = convolutional()
        engine = PrivacyEngine(secure_mode=arguments is None)
        wrapped, optimizer, _ = engine.make_private(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
            data_loader=DataLoader(TensorDataset(X), batch_size=5), noise_multiplier=1.0,
            max_grad_norm=1.0, poisson_sampling=False, **(arguments or {}),
        )  # fmt: skip
        return engine, wrapped, optimizer

    engine, model, optimizer = made()
    train(model, optimizer, 2)
    path = str(tmp_path / "checkpoint.pt")
    engine.save_checkpoint(path=path, module=model, optimizer=optimizer)
    train(model, optimizer, 1)
    for _ in range(2):
        engine, twin, resumed = made()
        engine.load_checkpoint(path=path, module=twin, optimizer=resumed)
        train(twin, resumed, 1)
    optimizer.zero_grad()
    copied = copy.deepcopy(optimizer)
    for each in (optimizer, copied):
        each.make_private_noise_only()
    assert len(ledger.ranges) >= 8 * 8
    assert len({key for key, _, _ in ledger.ranges}) == 4
    assert not ledger.reused()


def test_the_ledger_notices(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(monkeypatch)
    key = torch.tensor([1, 2, 3, 4])
    ledger.drawn(key, 0, 10)
    ledger.drawn(key + 1, 5, 10)
    ledger.drawn(key, 10, 1)
    assert not ledger.reused()
    ledger.drawn(key, 9, 1)
    assert ledger.reused()


def test_noise_is_independent_across_steps_and_parameters() -> None:
    model = nn.Sequential(*(nn.Linear(100, 100, bias=False) for _ in range(2)))
    _, optimizer, _ = PrivacyEngine().make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(torch.zeros(4, 100)), batch_size=4),
        noise_multiplier=1.0, max_grad_norm=1.0,
    )  # fmt: skip
    drawn = []
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.make_private_noise_only()
        drawn.extend(p.grad.flatten() * 4 for p in model.parameters())
    assert len(drawn) == 4
    correlations = torch.corrcoef(torch.stack(drawn)) - torch.eye(4)
    assert correlations.abs().max() < 6 / 10_000**0.5
