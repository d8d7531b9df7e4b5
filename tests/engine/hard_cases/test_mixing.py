"""Layers that mix samples, or whose gradient is easily wrong: right, or refused by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from opacus.validators.errors import UnsupportedModuleError
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from dpkernels import PrivacyEngine
from tests.engine.support import (
    Call,
    made_private,
    squared_loss,
    step,
    values,
)
from tests.engine.truth import assert_private, microbatching


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_padding_modes_stay_within_the_bound(mode: str) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode).double()
    assert_private(conv, squared_loss, (values(3, 2, 5, 6),))
    _, model, _, _ = made_private(conv, values(1, 2, 5, 6) * 100)
    squared_loss(model, (values(1, 2, 5, 6) * 100,)).backward()
    norm = torch.sqrt(sum(p.summed_grad.square().sum() for p in model.parameters()))
    assert 0.99 < float(norm) <= 1.0


class FunctionalEmbedding(nn.Module):
    """A table of one's own, used with padding."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(11, 6))

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        return F.embedding(indices, self.table, padding_idx=3)


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Embedding(11, 6, padding_idx=3),
        lambda: nn.EmbeddingBag(11, 6, mode="sum", padding_idx=3),
        FunctionalEmbedding,
    ],
    ids=["Embedding", "EmbeddingBag", "functional"],
)
def test_padding_positions_have_no_gradient(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    indices = torch.tensor([[1, 3, 3, 3], [2, 3, 4, 4], [3, 3, 3, 9]])
    assert_private(build().double(), squared_loss, (indices,))


@pytest.mark.parametrize("indices", ["expanded", "strided", "batch-1"])
def test_embedding_ids_of_every_layout(indices: str) -> None:
    torch.manual_seed(0)

    def positions(x: torch.Tensor) -> torch.Tensor:
        length = torch.arange(x.shape[1])
        return {
            "expanded": length.expand(len(x), -1),
            "strided": torch.stack([length, length], 1).expand(len(x), -1, 2)[..., 0],
            "batch-1": length[None],
        }[indices]

    model = Call(nn.Embedding(7, 5), lambda m, x: m(positions(x)) * x)
    assert_private(model.double(), squared_loss, (values(4, 7, 5),))


def test_one_row_for_everybody_is_refused() -> None:
    """All samples' gradients would be booked on the sample that owns the row."""
    model = Call(nn.Embedding(5, 6), lambda m, x: x + m(torch.arange(5)[None])[0])
    with pytest.raises(ValueError, match=r"'module'.*sample \d move when sample"):
        made_private(model, values(4, 5, 6).float())[1](values(4, 5, 6).float())


def test_rows_that_are_not_samples_are_refused() -> None:
    class Prototypes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)
            self.register_buffer("prototypes", torch.randn(8, 6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.layer(self.prototypes).T

    for rows, message in ((4, "'layer'.*move when sample"), (3, "8 rows for 3 samples")):
        x = values(rows, 6).float()
        with pytest.raises(ValueError, match=message):
            made_private(Prototypes(), x)[1](x)


@pytest.mark.parametrize("scale", [1e-24, 1.0, 1e24])
@pytest.mark.parametrize("share", [1.0, 1e-3, 1e-6])
def test_mixing_is_found_at_any_scale(scale: float, share: float) -> None:
    """Squares of such values leave float32's range, and small shares are as small as rounding."""

    def centred(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        mixed = x - share * x.mean(0, keepdim=True)
        return layer(scale * (mixed - mixed.mean(1, keepdim=True)))

    x = values(4, 6).float()
    with pytest.raises(ValueError, match=r"'module': the activations of sample \d move"):
        made_private(Call(nn.Linear(6, 3), centred), x)[1](x)


def test_products_of_another_number_of_rows_round_differently_and_mix_nobody() -> None:
    """A mixture of experts that is exact for every sample, in products of one expert's rows."""

    def experts(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        first = x[:, 0] > 0
        hidden = torch.empty(len(x), 64)
        for rows, expert in ((first, 0), (~first, 1)):
            hidden[rows] = x[rows] @ weights[expert]
        return layer(hidden.tanh())

    torch.manual_seed(0)
    weights, x = torch.randn(2, 300, 64), torch.randn(33, 300)
    wrapped = made_private(Call(nn.Linear(64, 3), experts), x, trial="every")[1]
    for _ in range(4):
        wrapped(torch.randn(33, 300))


def test_a_trial_run_leaves_the_inputs_their_graph_and_gradients() -> None:
    leaf = values(4, 6).float().requires_grad_()
    given = leaf.square()
    wrapped = made_private(nn.Linear(6, 3), values(4, 6).float())[1]
    output = wrapped(given)
    assert leaf.grad is None
    output.sum().backward()
    weight = next(wrapped.parameters())
    torch.testing.assert_close(leaf.grad, 2 * leaf.detach() * weight.detach().sum(0))


class Pairs(nn.Module):
    """Sees each sample once, later twice: behind one another, or side by side."""

    def __init__(self, adjacent: bool) -> None:
        super().__init__()
        self.layer, self.adjacent, self.twice = nn.Linear(6, 4), adjacent, False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.twice:
            return self.layer(x)
        pairs = torch.stack([x, x.tanh()], 1 if self.adjacent else 0)
        both = self.layer(pairs.flatten(0, 1)).unflatten(0, pairs.shape[:2])
        return both.sum(1 if self.adjacent else 0)


@pytest.mark.parametrize("adjacent", [True, False])
def test_a_layer_that_sees_other_rows_later_is_tried_again(adjacent: bool) -> None:
    torch.manual_seed(0)
    model, x = Pairs(adjacent), values(4, 6).float()
    _, wrapped, optimizer, _ = made_private(model, x)
    step(wrapped, optimizer, x)
    model.twice = True
    optimizer.zero_grad()
    if not adjacent:
        for _ in range(2):
            with pytest.raises(ValueError, match=r"'layer'.*move when sample"):
                wrapped(x)
        return
    expected = microbatching(model, squared_loss, (x,), 1.0)
    squared_loss(wrapped, (x,)).backward()
    torch.testing.assert_close(optimizer.last_step.per_sample_norm, expected.norms)


def test_statistics_over_a_quarter_of_the_batch_are_refused() -> None:
    """They mix nobody in a batch of four samples, which a trial must not shrink to."""

    def centred_in_quarters(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        hidden = layer(x).unflatten(0, (4, -1))
        return (hidden - hidden.mean(1, keepdim=True)).flatten(0, 1)

    x = values(8, 5).float()
    wrapped = made_private(Call(nn.Linear(5, 6), centred_in_quarters), x)[1]
    with pytest.raises(ValueError, match=r"values of output 0 of sample \d move when sample"):
        wrapped(x)


def test_a_refused_model_is_refused_again() -> None:
    model = Call(nn.Embedding(5, 6), lambda m, x: x + m(torch.arange(5)[None])[0])
    wrapped, x = made_private(model, values(4, 5, 6).float())[1], values(4, 5, 6).float()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"'module'.*sample \d move"):
            wrapped(x)


def test_batch_norm_is_refused_also_when_thawed_later() -> None:
    with pytest.raises(UnsupportedModuleError, match=r"'1' \(BatchNorm2d\).*GroupNorm"):
        made_private(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), values(4, 1, 5, 5))
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    model[1].requires_grad_(False).eval()
    x = values(4, 1, 5, 5).float()
    _, wrapped, optimizer, _ = made_private(model, x)
    step(wrapped, optimizer, x)
    wrapped.train()
    with pytest.raises(ValueError, match=r"'1' \(BatchNorm2d\).*in training mode now.*\.eval\(\)"):
        wrapped(x)


class Average(nn.Module):
    """Keeps a moving average of what it sees, in place or anew."""

    def __init__(self, in_place: bool, private: bool = True) -> None:
        super().__init__()
        self.in_place, self.private = in_place, private
        self.layer = nn.Linear(4, 4)
        self.register_buffer("average", torch.zeros(4, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = x.mean(0) if self.private else self.layer.weight.detach().mean(0)
        if self.in_place:
            self.average.mul_(0.9).add_(seen)
        else:
            self.average = 0.9 * self.average + seen
        return self.layer(x)


@pytest.mark.parametrize("in_place", [True, False])
def test_buffers_that_keep_private_data_are_refused(in_place: bool) -> None:
    x = values(4, 4)

    class First(Average):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.average = x.mean(0) if self.average is None else self.average
            return self.layer(x)

    model = First(in_place).double()
    model.average = None
    with pytest.raises(ValueError, match="buffer 'average'.*private data"):
        squared_loss(made_private(model, x)[1], (x,))
    assert model.average is None
    model = Average(in_place).double()
    _, wrapped, _, _ = made_private(model, x)
    with pytest.raises(ValueError, match="buffer 'average'.*private data"):
        squared_loss(wrapped, (x,))
    assert float(model.average.abs().max()) == 0.0, "the trial leaves no trace"
    model = Average(in_place, private=False).double()
    expected = model.layer.weight.detach().mean(0).clone()
    _, wrapped, optimizer, _ = made_private(model, x)
    step(wrapped, optimizer, x)
    assert torch.equal(model.average, expected), "of the weights alone it is nobody's"


def normalised(**kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, **kwargs)).double()
    for statistic in model[1].buffers():
        if statistic.is_floating_point():
            statistic.uniform_(0.5, 2.0)
    model[1].eval()
    return model


def test_batch_norm_with_fixed_statistics_trains_its_scale() -> None:
    assert_private(normalised(), squared_loss, (values(4, 1, 5, 5),))


def test_batch_norm_without_running_statistics_mixes_in_eval_mode_too() -> None:
    for trained in (True, False):
        model = normalised(track_running_stats=False)
        model[1].requires_grad_(trained)
        with pytest.raises(UnsupportedModuleError, match=r"'1' \(BatchNorm2d\).*GroupNorm"):
            made_private(model, values(4, 1, 5, 5))


def test_a_fixed_model_keeps_its_signal() -> None:
    """gcd(32, channels) groups of one channel each leave nothing of a map of one position."""
    model = nn.Sequential(nn.Conv2d(1, 8, 5), nn.BatchNorm2d(8), nn.GroupNorm(8, 8))
    x = values(4, 1, 5, 5).float()
    with pytest.warns(UserWarning, match="GroupNorm at 1 has one channel.*state num_groups"):
        erased = PrivacyEngine.get_compatible_module(model)
    assert float(erased[:2](x).detach().abs().max()) < 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = PrivacyEngine.get_compatible_module(model, num_groups=2)
    assert kept[1].num_groups == 2
    assert float(kept[:2](x).detach().abs().max()) > 0.1


def test_instance_norm_with_running_statistics_is_refused() -> None:
    norm = nn.InstanceNorm2d(2, affine=True, track_running_stats=True)
    with pytest.raises(UnsupportedModuleError, match="InstanceNorm2d.*track_running_stats=False"):
        made_private(norm, values(4, 2, 5, 5))


@pytest.mark.parametrize("build", [
    lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
    lambda: nn.utils.spectral_norm(nn.Linear(4, 4)),
    lambda: nn.utils.weight_norm(nn.Linear(4, 4)),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_reparametrizations_that_cannot_be_right_are_refused(
    build: Callable[[], nn.Module],
) -> None:
    with pytest.raises(UnsupportedModuleError, match=r"use torch.nn.utils.parametrizations"):
        made_private(build(), values(4, 4))


def test_pruned_weights_are_refused_at_the_first_backward() -> None:
    model = nn.Sequential(prune.random_unstructured(nn.Linear(4, 4), "weight", 0.5))
    _, wrapped, _, _ = made_private(model, values(4, 4).float())
    with pytest.raises(ValueError, match="'0.weight_orig'.*outside its module's forward"):
        squared_loss(wrapped, (values(4, 4).float(),)).backward()


def test_complex_parameters_are_refused() -> None:
    class Phase(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.phase = nn.Parameter(torch.randn(4, dtype=torch.complex64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * self.phase).abs()

    with pytest.raises(UnsupportedModuleError, match="'phase' is complex.*view_as_real"):
        made_private(Phase(), values(4, 4).float())
