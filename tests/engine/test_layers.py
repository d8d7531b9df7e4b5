"""Layers in models: tied, reused, nested, checkpointed, without a rule; the rules themselves are
tested in tests/layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.engine.support import ids, squared_loss, values
from tests.engine.truth import assert_private


class Positions(nn.Module):
    """Token and position embeddings; position ids have batch size 1."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 6, padding_idx=0)
        self.positions = nn.Embedding(9, 6)
        self.norm = nn.LayerNorm(6, bias=False)
        self.head = nn.Linear(6, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(ids.shape[1]).unsqueeze(0)
        return self.head(self.norm(self.tokens(ids) + self.positions(positions)))


class Tied(nn.Module):
    """Input and output embedding share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 6)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.mix(self.tokens(ids)).tanh())


class Reused(nn.Module):
    """One layer called three times, with different lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)
        self.scale = nn.PReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.scale(self.layer(x))
        return self.scale(self.layer(x)) + self.layer(x[:, :1])


class Twice(nn.Module):
    """One module registered under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(3, 3, 3, padding=1)
        self.second = nn.ModuleList([self.first])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second[0](self.first(x).relu())


class BareParameters(nn.Module):
    """Parameters used directly, beside dropout at rate 0 and a layer with a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(1, 4, 5))
        self.table = nn.Parameter(torch.randn(7, 5))
        self.layer = nn.Linear(5, 4)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        index = torch.tensor([0, 3, 3, 6])
        return self.layer(self.dropout(x + self.shift) * self.table[index])


class StandardisedConv(nn.Conv2d):
    """A subclass that computes its own weight: the rule of its base class must not apply."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class Branch(nn.Module):
    """A branch that is not taken."""

    def __init__(self) -> None:
        super().__init__()
        self.taken, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.taken(x)


class KeywordsOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.conv = nn.Linear(6, 6), nn.Conv1d(3, 2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(input=self.layer(input=x))


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.block = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        self.head = nn.Linear(6, 2)
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = checkpoint(self.block, self.stem(x), use_reentrant=self.reentrant)
        return self.head(x)


class Windows(nn.Module):
    """Folds windows into the batch axis, as Swin blocks do."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, length, width = x.shape
        folded = x.reshape(rows * length // 2, 2, width)
        return self.layer(self.norm(folded)).reshape(rows, length, width)


def frozen_first() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    model[0].weight.requires_grad_(False)
    return model


CASES: dict[str, tuple[Callable[[], nn.Module], torch.Tensor]] = {
    "inplace-relu": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3),
            nn.InstanceNorm2d(3, affine=True),
            nn.ReLU(inplace=True),
            nn.Conv2d(3, 2, 1),
        ),
        values(4, 2, 6, 6),
    ),
    "inplace-after-3d-linear": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 2)),
        values(4, 3, 4),
    ),
    "positions": (Positions, ids(4, 9)),
    "tied": (Tied, ids(4, 5)),
    "reused": (Reused, values(4, 3, 5)),
    "registered-twice": (Twice, values(4, 3, 8)),
    "bare-parameters": (BareParameters, values(3, 4, 5)),
    "overridden-forward": (lambda: StandardisedConv(2, 3, 3), values(4, 2, 6, 6)),
    "weight-norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), values(4, 4)),
    "attention": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
        values(4, 5, 8),
    ),
    "branch-not-taken": (Branch, values(4, 4)),
    "keywords-only": (KeywordsOnly, values(4, 3, 6)),
    "checkpoint": (lambda: Checkpointed(False), values(4, 3, 4)),
    "checkpoint-reentrant": (lambda: Checkpointed(True), values(4, 3, 4)),
    "windows": (Windows, values(3, 6, 4)),
    "frozen": (frozen_first, values(4, 4)),
    "dropout-eval": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5).eval()), values(4, 4)),
}


@pytest.mark.parametrize("name", CASES)
def test_equal_to_microbatching(name: str, poisoned_memory: None) -> None:
    torch.manual_seed(0)
    build, x = CASES[name]
    assert_private(build().double(), squared_loss, (x,))


@pytest.mark.parametrize("name", ["inplace-relu", "inplace-after-3d-linear", "positions", "tied"])
def test_views_of_one_sample_are_averaged_before_clipping(name: str) -> None:
    torch.manual_seed(0)
    build, x = CASES[name]
    assert_private(build().double(), squared_loss, (x,), views_per_sample=2)


def test_second_axis_is_the_sample_axis() -> None:
    torch.manual_seed(0)

    def loss(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return (model(batch[0]).square().sum((0, 2))).mean()

    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 2)).double()
    assert_private(model, loss, (values(3, 5, 4),), batch_first=False)


def test_expanded_backprops() -> None:
    torch.manual_seed(0)

    def loss(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return model(batch[0]).flatten(1).sum(1).mean()

    assert_private(nn.Conv2d(2, 3, 3).double(), loss, (values(4, 2, 6, 6),))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_accurate_as_the_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.LayerNorm(32), nn.Linear(32, 4))
    x = values(6, 5, 16).float()
    assert_private(model.to(dtype), squared_loss, (x.to(dtype),), 1.0, tolerance=5e-2)


def test_autocast_keeps_parameters_and_sums_in_float32() -> None:
    torch.manual_seed(0)

    def loss(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(batch[0])
        return output.float().square().flatten(1).sum(1).mean()

    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(128, 4))
    assert_private(model, loss, (values(6, 2, 6, 6).float(),), 1.0, tolerance=3e-2)


def test_functional_use_of_a_weight_is_refused_by_name() -> None:
    class Bypass(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.layer.weight)

    with pytest.raises(ValueError, match="layer.weight.*outside its module's forward"):
        assert_private(Bypass().double(), squared_loss, (values(4, 4),))


def test_a_norm_wrong_by_one_percent_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from dpkernels.engine.release.pending import ParameterGradient

    true_norm = ParameterGradient.norm_sq
    monkeypatch.setattr(ParameterGradient, "norm_sq", lambda self: true_norm(self) * 1.01**2)
    with pytest.raises(AssertionError, match="relative error|norms differ"):
        assert_private(nn.Linear(7, 3).double(), squared_loss, (values(4, 7),))
