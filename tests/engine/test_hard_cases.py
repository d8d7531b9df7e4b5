"""Where DP breaks silently elsewhere: right against one sample at a time, or refused by name.

docs/pitfalls.md explains each case and names its test.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from opacus.schedulers import ExponentialGradClip, ExponentialNoise
from opacus.validators.errors import UnsupportedModuleError
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    Sampler,
    TensorDataset,
    WeightedRandomSampler,
)

from dpkernels import PrivacyEngine
from dpkernels.engine.module import FusedGradSampleModule
from dpkernels.engine.optimizer import FusedDPOptimizer
from tests.engine.test_layers import ids, squared_loss, values
from tests.engine.truth import assert_private, microbatching, relative_error


class Call(nn.Module):
    """A module called in a way of its own: ``call(module, x)``."""

    def __init__(self, module: nn.Module, call: Callable[[nn.Module, torch.Tensor], torch.Tensor]):
        super().__init__()
        self.module, self.call = module, call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(self.module, x)


def made_private(
    model: nn.Module,
    x: torch.Tensor,
    noise: float = 0.0,
    max_grad_norm: object = 1.0,
    **kwargs: object,
) -> tuple[PrivacyEngine, nn.Module, FusedDPOptimizer, DataLoader]:
    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(x), batch_size=len(x)), noise_multiplier=noise,
        max_grad_norm=max_grad_norm, **kwargs,
    )  # fmt: skip
    return engine, model, optimizer, loader


def step(model: nn.Module, optimizer: FusedDPOptimizer, x: torch.Tensor) -> None:
    optimizer.zero_grad()
    squared_loss(model, (x,)).backward()
    optimizer.step()


# --- losses and criteria ---------------------------------------------------------------------


@pytest.mark.parametrize("per_sample", [False, True])
def test_loss_of_shape_b1(per_sample: bool) -> None:
    torch.manual_seed(0)

    def loss(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        target = (batch[0][:, :1] > 0).double()
        if per_sample:
            return nn.BCEWithLogitsLoss(reduction="none")(model(batch[0]), target).mean()
        return nn.BCEWithLogitsLoss()(model(batch[0]), target)

    assert_private(
        nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)).double(), loss, (values(6, 5),)
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_an_ordinary_criterion_is_clipped(reduction: str) -> None:
    torch.manual_seed(0)
    x = values(8, 5).float() * 50
    _, model, optimizer, _ = made_private(nn.Linear(5, 3), x, loss_reduction=reduction)
    nn.CrossEntropyLoss(reduction=reduction)(model(x), torch.zeros(8, dtype=torch.long)).backward()
    total = torch.sqrt(sum(p.summed_grad.square().sum() for p in model.parameters()))
    assert optimizer.last_step.per_sample_norm.max() > 10
    assert 1.0 < float(total) <= 8.0


def test_voxelwise_loss() -> None:
    torch.manual_seed(0)

    def loss(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        voxels = F.cross_entropy(model(batch[0]), (batch[0][:, 0] > 0).long(), reduction="none")
        return voxels.mean((1, 2, 3)).mean()

    assert_private(nn.Conv3d(1, 2, 3, padding=1).double(), loss, (values(3, 1, 4, 5, 6),))


def coupled_dice(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    probability = output.sigmoid()
    overlap = 2 * (probability * target).sum()
    return 1 - overlap / (probability.sum() + target.sum())


def contrastive(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    similarity = F.normalize(output) @ F.normalize(target).T
    return F.cross_entropy(similarity, torch.arange(len(output)))


def ignoring(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    label = torch.where(target[:, 0] > 0, 0, -100)
    return F.cross_entropy(output, label)


@pytest.mark.parametrize("criterion", [coupled_dice, contrastive, ignoring])
def test_criteria_that_couple_samples_are_found(criterion: Callable[..., torch.Tensor]) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(6, 5), torch.rand(6, 3) - 0.3
    with pytest.raises(ValueError, match="criterion couples samples"):
        PrivacyEngine().check_per_sample(nn.Linear(5, 3), criterion, (x, y))
    PrivacyEngine().check_per_sample(nn.Linear(5, 3), nn.MSELoss(), (x, y))


def test_rows_of_one_patient_are_one_sample() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.GroupNorm(1, 3), nn.Flatten(), nn.Linear(12, 2))
    assert_private(model.double(), squared_loss, (values(6, 1, 4, 4),), views=2)


# --- layers that mix samples, or whose gradient is easily wrong ------------------------------


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


@pytest.mark.parametrize("mode", ["mean", "sum", "max"])
def test_embedding_bag(mode: str) -> None:
    torch.manual_seed(0)
    assert_private(nn.EmbeddingBag(11, 6, mode=mode).double(), squared_loss, (ids(4, 5),))


def test_embedding_bag_with_offsets_is_refused() -> None:
    model = Call(nn.EmbeddingBag(11, 6), lambda m, x: m(x.flatten(), torch.arange(0, x.numel(), 5)))
    with pytest.raises(ValueError, match=r"'module' \(EmbeddingBag\).*pad the indices"):
        made_private(model, ids(4, 5).float())[1](ids(4, 5))


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
    with pytest.raises(ValueError, match=r"'module'.*sample 0 move when sample 3 is replaced"):
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


# --- attention and recurrent layers as they stand --------------------------------------------


def transposed(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Call a module whose sample axis is the second."""
    x = x.transpose(0, 1)
    output = module(x, x, x) if isinstance(module, nn.MultiheadAttention) else module(x)
    return (output[0] if isinstance(output, tuple) else output).transpose(0, 1)


def hidden(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The last hidden state, whose sample axis is the second."""
    state = module(x)[1]
    return (state[0] if isinstance(state, tuple) else state).transpose(0, 1)


def given(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Call with a first hidden state."""
    state = x[None, :, 0, :1].expand(1, -1, 6).contiguous()
    return module(x, (state, state) if isinstance(module, nn.LSTM) else state)[0]


@pytest.mark.parametrize("length", [4, 3], ids=["square", "oblong"])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers(kind: type[nn.RNNBase], length: int) -> None:
    torch.manual_seed(0)
    x = values(4, length, 5)
    first = kind(5, 6, 2, batch_first=True, bidirectional=True)
    assert_private(Call(first, hidden).double(), squared_loss, (x,))
    assert_private(Call(kind(5, 6, batch_first=True), given).double(), squared_loss, (x,))
    assert_private(Call(kind(5, 6), transposed).double(), squared_loss, (x,))


def test_packed_sequences_are_refused() -> None:
    def packed(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        lengths = torch.full((len(x),), x.shape[1])
        return module(nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True))[0].data

    x = values(4, 3, 5).float()
    with pytest.raises(ValueError, match=r"'module' \(LSTM\).*PackedSequence.*padded tensor"):
        made_private(Call(nn.LSTM(5, 6, batch_first=True), packed), x)[1](x)


def causal(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    return module(x, x, x, attn_mask=mask, need_weights=False)[0]


def padded(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    mask = (x[..., 0] > x[:, :1, 0]) & (torch.arange(x.shape[1]) > 0)
    return module(x, x, x, key_padding_mask=mask)[0]


@pytest.mark.parametrize("build", [
    lambda: Call(nn.MultiheadAttention(8, 2, batch_first=True), causal),
    lambda: Call(nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True), padded),
    lambda: Call(nn.MultiheadAttention(8, 2), transposed),
    lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
    lambda: Call(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0), 2,
                                       nn.LayerNorm(8), enable_nested_tensor=False), transposed),
], ids=["causal", "padded", "second-axis", "encoder-layer", "encoder-second-axis"])  # fmt: skip
def test_attention(build: Callable[[], nn.Module]) -> None:
    """As many positions as samples: nothing can be told by sizes."""
    torch.manual_seed(0)
    assert_private(build().double(), squared_loss, (values(4, 4, 8),))


def test_bilinear_and_layers_without_parameters() -> None:
    torch.manual_seed(0)
    bilinear = Call(nn.Bilinear(5, 5, 3), lambda m, x: m(x, x.tanh()))
    assert_private(bilinear.double(), squared_loss, (values(4, 3, 5),))
    local = nn.Sequential(nn.Conv2d(2, 4, 3), nn.LocalResponseNorm(2), nn.AvgPool2d(2))
    assert_private(local.double(), squared_loss, (values(4, 2, 6, 6),))


# --- bare parameters -------------------------------------------------------------------------


class Tokens(nn.Module):
    """A vision transformer's root: class token, positions, a scale, a scalar, beside layers."""

    def __init__(self, scale_like_samples: bool = False) -> None:
        super().__init__()
        self.patch = nn.Linear(6, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(1, 5, 8))
        self.scale = nn.Parameter(torch.zeros(8))
        self.temperature = nn.Parameter(torch.tensor(0.3))
        self.unused = nn.Parameter(torch.randn(8))
        self.head = nn.Linear(8, 3)
        nn.init.zeros_(self.head.weight[1:])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), self.patch(x)], 1) + self.positions
        x = x + self.scale * x.tanh()
        return self.head(x * self.temperature.exp())


class Shared(nn.Module):
    """A parameter whose use does not broadcast over samples: it stays a unit."""

    def __init__(self) -> None:
        super().__init__()
        self.mixing = nn.Parameter(torch.randn(5, 5))
        self.pair = nn.ParameterList([torch.randn(5), torch.randn(5)])
        self.layer = nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) @ self.mixing * self.pair[0] + self.pair[1]


@pytest.mark.parametrize("views", [1, 2])
def test_bare_parameters_beside_layers(views: int) -> None:
    torch.manual_seed(0)
    assert_private(Tokens().double(), squared_loss, (values(4, 4, 6),), views=views)


def test_layers_beside_bare_parameters_keep_their_rules() -> None:
    torch.manual_seed(0)
    engine, model, _, _ = made_private(Tokens().double(), values(4, 4, 6))
    squared_loss(model, (values(4, 4, 6),)).backward()
    strategies = {row["parameter"]: row["backend"] for row in engine.explain().rows}
    assert strategies["patch.weight"] != "autograd"
    assert strategies["token"] == "autograd"


@pytest.mark.parametrize("shape", [(4, 5), (4, 4, 5), (5, 5, 5), (2, 2, 5)])
def test_bare_parameters_that_do_not_broadcast(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    assert_private(Shared().double(), squared_loss, (values(*shape),))


# --- the backward pass -----------------------------------------------------------------------


def test_a_parameter_that_was_not_used_gets_noise_and_no_gradient() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"used": nn.Linear(4, 3), "not": nn.Linear(30, 30)})
    x = values(4, 4).float()
    _, wrapped, optimizer, _ = made_private(Call(model, lambda m, x: m["used"](x)), x, noise=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        squared_loss(wrapped, (x,)).backward()
        noise = model["not"].weight.grad * 4
        assert 0.85 < float(noise.std()) < 1.15
        used = microbatching(model["used"], squared_loss, (x,), 1.0)
        torch.testing.assert_close(optimizer.last_step.per_sample_norm, used.norms)
        optimizer.step()
        model["used"].load_state_dict(model["used"].state_dict())


def test_a_second_backward_accumulates_or_is_refused() -> None:
    torch.manual_seed(0)
    x = values(4, 5).float()
    expected = microbatching(nn.Linear(5, 3), squared_loss, (x,), 1.0)
    torch.manual_seed(0)
    layer = nn.Linear(5, 3)
    _, model, _, _ = made_private(layer, x, poisson_sampling=False)
    expected = microbatching(layer, squared_loss, (x,), 1.0)
    for _ in range(2):
        squared_loss(model, (x,)).backward()
    assert relative_error(layer.weight.grad, expected.gradients["weight"]) < 1e-5
    _, model, _, _ = made_private(nn.Linear(5, 3), x)
    squared_loss(model, (x,)).backward()
    with pytest.raises(ValueError, match="not compatible with grad accumulation"):
        squared_loss(model, (x,)).backward()


def test_a_training_forward_that_is_never_backpropagated() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4, bias=False), nn.Linear(4, 3))
    x = values(4, 5).float()
    expected = microbatching(model, squared_loss, (x,), 1.0)
    _, wrapped, _, _ = made_private(model, x)
    wrapped(values(7, 5).float())
    squared_loss(wrapped, (x,)).backward()
    assert relative_error(model[0].weight.grad, expected.gradients["0.weight"]) < 1e-5


def test_input_gradients_pass_by_and_release_nothing() -> None:
    torch.manual_seed(0)
    x = values(4, 5).float().requires_grad_()
    _, model, optimizer, _ = made_private(
        nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)), x.detach()
    )
    (saliency,) = torch.autograd.grad(model(x).sum(), x)
    assert float(saliency.abs().sum()) > 0
    assert all(p.grad is None for p in model.parameters())
    step(model, optimizer, x)


def test_second_derivatives_are_refused() -> None:
    x = values(4, 5).float().requires_grad_()
    _, model, _, _ = made_private(
        nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)), x.detach()
    )
    with pytest.raises(ValueError, match="create_graph"):
        squared_loss(model, (x,)).backward(create_graph=True)


def test_grad_scaler_is_refused() -> None:
    x = values(4, 5).float()
    _, model, optimizer, _ = made_private(nn.Linear(5, 3), x)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(squared_loss(model, (x,))).backward()
    with pytest.raises(ValueError, match="GradScaler.*bfloat16 autocast"):
        scaler.step(optimizer)
    optimizer.zero_grad()
    off = torch.amp.GradScaler("cpu", enabled=False)
    off.scale(squared_loss(model, (x,))).backward()
    off.step(optimizer)


def test_nested_inputs_and_outputs() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, batch: dict[str, object]) -> dict[str, object]:
            x, (y, scale) = batch["x"], batch["rest"]
            return {"a": self.one(x) * scale, "b": [self.two(y), None]}

    def loss(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        out = model({"x": batch[0], "rest": (batch[0].tanh(), 2.0)})
        return (out["a"] + out["b"][0]).square().sum(1).mean()

    torch.manual_seed(0)
    assert_private(Nested().double(), loss, (values(4, 4),))


class Scaled(nn.Linear):
    """A subclass that keeps the base class's forward."""

    def extra_repr(self) -> str:
        return "scaled"


def test_subclasses_of_layers_that_have_a_rule() -> None:
    torch.manual_seed(0)
    assert_private(Scaled(5, 3).double(), squared_loss, (values(4, 5),))


@pytest.mark.parametrize(("build", "shape"), [
    (lambda: nn.Conv3d(2, 3, 3), (3, 2, 5, 5, 5)),
    (lambda: nn.ConvTranspose3d(2, 3, 2, stride=2), (3, 2, 3, 3, 3)),
])  # fmt: skip
def test_channels_last_3d(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = values(*shape).contiguous(memory_format=torch.channels_last_3d)
    model = build().double().to(memory_format=torch.channels_last_3d)
    assert_private(model, squared_loss, (x,))


EMPTY: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 3), (4,)),
    "conv": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.GroupNorm(1, 3)), (2, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(2, 3, 2, stride=2), (2, 3, 3)),
    "instance-norm": (lambda: nn.InstanceNorm2d(2, affine=True), (2, 4, 4)),
    "layer-norm": (lambda: nn.Sequential(nn.LayerNorm(4), nn.PReLU()), (3, 4)),
    "attention": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (3, 8)),
    "recurrent": (lambda: Call(nn.LSTM(4, 3, batch_first=True), hidden), (3, 4)),
    "bare": (Tokens, (4, 6)),
}


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_batch_is_noise_alone(name: str) -> None:
    torch.manual_seed(0)
    build, shape = EMPTY[name]
    x = values(4, *shape).float()
    _, model, optimizer, _ = made_private(build(), x, noise=1.0)
    step(model, optimizer, x)
    optimizer.zero_grad()
    model(x[:0]).square().sum().backward()
    noise = torch.cat([p.grad.flatten() for p in model.parameters()]) * 4
    assert noise.isfinite().all()
    assert abs(float(noise.std()) - 1.0) < 5 / math.sqrt(2 * len(noise))
    optimizer.step()


def test_compiled_model_runs_as_it_stands() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    x = values(4, 5).float()
    expected = microbatching(model, squared_loss, (x,), 1.0)
    _, wrapped, _, _ = made_private(model, x)
    squared_loss(torch.compile(wrapped, backend="eager"), (x,)).backward()
    assert relative_error(model[0].weight.grad, expected.gradients["0.weight"]) < 1e-5


# --- the mechanism: bound, noise, rate -------------------------------------------------------


@pytest.mark.parametrize(("bound", "noise"), [(0.5, 1.0), (1.0, 3.0)])
def test_schedulers_move_clip_and_noise_together(bound: float, noise: float) -> None:
    torch.manual_seed(0)
    x = values(4, 50).float() * 100
    model = nn.Linear(50, 100)
    engine, wrapped, optimizer, _ = made_private(model, x, noise=noise, max_grad_norm=bound)
    clip, sigma = ExponentialGradClip(optimizer, gamma=0.1), ExponentialNoise(optimizer, gamma=2.0)
    step(wrapped, optimizer, x)
    clip.step()
    sigma.step()
    optimizer.zero_grad()
    squared_loss(wrapped, (x,)).backward()
    report = optimizer.last_step
    torch.testing.assert_close(
        report.clip_factor * report.per_sample_norm, torch.full((4,), bound / 10)
    )
    optimizer.step()
    assert [entry[0] for entry in engine.accountant.history] == [noise, 2 * noise]
    optimizer.zero_grad()
    optimizer.make_private_noise_only()
    expected = 2 * noise * bound / 10 / 4
    assert abs(float(model.weight.grad.std()) / expected - 1) < 5 / math.sqrt(2 * 5000)


def test_the_mechanism_that_is_counted_is_the_one_that_was_drawn() -> None:
    x = values(4, 5).float()
    _, model, optimizer, _ = made_private(nn.Linear(5, 3), x, noise=1.0)
    squared_loss(model, (x,)).backward()
    optimizer.noise_multiplier = 2.0
    with pytest.raises(ValueError, match="noise_multiplier=2.0.*drawn in backward"):
        optimizer.step()
    _, model, optimizer, _ = made_private(nn.Linear(5, 3), x, noise=1.0, poisson_sampling=False)
    squared_loss(model, (x,)).backward()
    optimizer.max_grad_norm = 2.0
    with pytest.raises(ValueError, match="max_grad_norm=2.0.*drew the noise"):
        squared_loss(model, (x,)).backward()


def test_the_largest_bound_of_a_logical_batch_rules_its_noise() -> None:
    x = values(4, 50).float()
    model = nn.Linear(50, 100)
    _, wrapped, optimizer, _ = made_private(model, x * 100, noise=1000.0)
    optimizer.signal_skip_step(True)
    optimizer.signal_skip_step(False)
    step(wrapped, optimizer, x)
    optimizer.max_grad_norm = 0.01
    optimizer.zero_grad()
    squared_loss(wrapped, (x,)).backward()
    assert abs(float(model.weight.grad.std()) * 4 / 1000 - 1) < 0.1


def test_a_skip_signal_after_backward_is_refused() -> None:
    x = values(4, 5).float()
    _, model, optimizer, _ = made_private(nn.Linear(5, 3), x, noise=1.0)
    squared_loss(model, (x,)).backward()
    optimizer.signal_skip_step()
    with pytest.raises(ValueError, match="signal_skip_step.*after backward"):
        optimizer.step()


def test_per_layer_clipping_and_its_noise() -> None:
    torch.manual_seed(0)
    bounds = [3.0, 4.0, 12.0]
    model = nn.Sequential(nn.Linear(50, 40), nn.Tanh(), nn.Linear(40, 30, bias=False))
    x = values(4, 50).float() * 100
    _, wrapped, optimizer, _ = made_private(model, x, 0.0, bounds, clipping="per_layer")
    squared_loss(wrapped, (x[:1],)).backward()
    norms = [float(p.summed_grad.norm()) for p in model.parameters()]
    assert norms == pytest.approx([min(c, n) for c, n in zip(bounds, norms)], rel=1e-4)
    assert optimizer.max_grad_norm == pytest.approx(13.0)
    ExponentialGradClip(optimizer, gamma=0.5).step()
    optimizer.zero_grad()
    squared_loss(wrapped, (x[:1],)).backward()
    halves = [float(p.summed_grad.norm()) for p in model.parameters()]
    assert all(h <= c / 2 * (1 + 1e-5) for h, c in zip(halves, bounds))
    _, wrapped, optimizer, _ = made_private(model, x, 2.0, bounds, clipping="per_layer")
    optimizer.make_private_noise_only()
    for p in model.parameters():
        error = 6 / math.sqrt(2 * p.numel())
        assert abs(float(p.grad.std()) * 4 / (2.0 * 13.0) - 1) < error


ADAPTIVE = {
    "target_unclipped_quantile": 0.5, "clipbound_learning_rate": 0.2, "max_clipbound": 1e3,
    "min_clipbound": 1e-3, "unclipped_num_std": 1.0,
}  # fmt: skip


def test_adaptive_clipping_follows_the_quantile() -> None:
    torch.manual_seed(0)
    x = values(64, 5).float()
    model = nn.Linear(5, 3)
    _, wrapped, optimizer, _ = made_private(
        model, x, 0.0, 100.0, clipping="adaptive", poisson_sampling=False, **ADAPTIVE
    )
    norms = microbatching(model, squared_loss, (x,), 1.0).norms
    for _ in range(80):
        optimizer.zero_grad()
        squared_loss(wrapped, (x,)).backward()
        model.zero_grad(set_to_none=False)
        optimizer.step()
    inside = float((norms <= optimizer.max_grad_norm).float().mean())
    assert 0.35 < inside < 0.65


def test_adaptive_clipping_spends_the_rest_on_the_gradient() -> None:
    model = nn.Linear(100, 100)
    _, _, optimizer, _ = made_private(
        model, values(4, 100).float(), 1.0, 2.0, clipping="adaptive", **ADAPTIVE
    )
    optimizer.make_private_noise_only()
    expected = (1.0 - 2.0**-2) ** -0.5 * 2.0 / 4
    assert abs(float(model.weight.grad.std()) / expected - 1) < 6 / math.sqrt(2 * 1e4)
    settings = {k: v for k, v in ADAPTIVE.items() if k != "unclipped_num_std"}
    with pytest.raises(ValueError, match="needs unclipped_num_std"):
        made_private(model, values(4, 100), 1.0, 2.0, clipping="adaptive", **settings)
    with pytest.raises(ValueError, match="smaller than 2 \\* unclipped_num_std"):
        made_private(model, values(4, 100), 2.0, 2.0, clipping="adaptive", **ADAPTIVE)


def test_bounds_that_do_not_fit_the_clipping_are_refused() -> None:
    x = values(4, 5).float()
    with pytest.raises(ValueError, match="2 trained parameters, got 3"):
        made_private(nn.Linear(5, 3), x, 1.0, [1.0, 1.0, 1.0], clipping="per_layer")
    with pytest.raises(ValueError, match="clipping='per_layer'"):
        made_private(nn.Linear(5, 3), x, 1.0, [1.0, 1.0])
    with pytest.raises(ValueError, match="unexpected argument 'materialise_grad_samples'"):
        made_private(nn.Linear(5, 3), x, materialise_grad_samples=True)


def test_noise_is_not_drawn_from_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("noise from torch's generator")

    model = nn.Linear(100, 50).bfloat16()
    x = values(4, 100).bfloat16()
    _, _, optimizer, _ = made_private(model, x, noise=3.0)
    monkeypatch.setattr(torch, "normal", refuse)
    torch.manual_seed(0)
    optimizer.make_private_noise_only()
    first = model.weight.grad.clone()
    optimizer.zero_grad()
    torch.manual_seed(0)
    optimizer.make_private_noise_only()
    assert not torch.equal(first, model.weight.grad)
    assert abs(float(first.float().std()) * 4 / 3 - 1) < 6 / math.sqrt(2 * 5000)


def test_clip_factors_are_float32_and_sound_in_half_precision() -> None:
    torch.manual_seed(0)
    x = (values(64, 40) * 30).bfloat16()
    _, model, optimizer, _ = made_private(nn.Linear(40, 10).bfloat16(), x)
    squared_loss(model, (x,)).backward()
    report = optimizer.last_step
    assert report.clip_factor.dtype == torch.float32
    assert (report.clip_factor.double() * report.per_sample_norm.double() <= 1.0 + 1e-7).all()
    assert all(p.summed_grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize(("count", "batch"), [(98, 1), (107, 1), (100, 64), (37, 8)])
def test_rate_steps_and_denominator(count: int, batch: int) -> None:
    model = nn.Linear(3, 2)
    engine = PrivacyEngine()
    _, optimizer, loader = engine.make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(torch.randn(count, 3)), batch_size=batch),
        noise_multiplier=1.0, max_grad_norm=1.0,
    )  # fmt: skip
    assert len(loader) == len(list(loader.batch_sampler)) == math.ceil(count / batch)
    assert loader.sample_rate == batch / count
    assert optimizer.expected_batch_size == batch


class EveryOther(Sampler):
    def __iter__(self) -> Iterator[list[int]]:
        yield from ([0, 2], [1, 3])

    def __len__(self) -> int:
        return 2


@pytest.mark.parametrize("arguments", [
    {"batch_size": 2, "sampler": WeightedRandomSampler([0.9, 0.1, 0.1, 0.1], 4)},
    {"batch_sampler": EveryOther()},
], ids=["WeightedRandomSampler", "EveryOther"])  # fmt: skip
def test_samplers_of_ones_own_are_refused_or_stated(
    arguments: dict[str, object], request: pytest.FixtureRequest
) -> None:
    name = request.node.callspec.id
    loader = DataLoader(TensorDataset(torch.randn(4, 3)), **arguments)

    def private(**kwargs: object) -> None:
        model = nn.Linear(3, 2)
        PrivacyEngine().make_private(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0, **kwargs,
        )  # fmt: skip

    with pytest.raises(ValueError, match=f"{name}.*poisson_sampling=False"):
        private()
    with pytest.warns(UserWarning, match=f"{name}.*does not hold"):
        private(poisson_sampling=False)


def test_samplers_that_draw_alike_are_taken() -> None:
    dataset = TensorDataset(torch.randn(8, 3))
    for arguments in (
        {"shuffle": True},
        {"sampler": DistributedSampler(dataset, num_replicas=2, rank=0)},
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = nn.Linear(3, 2)
            PrivacyEngine().make_private(
                module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
                data_loader=DataLoader(dataset, batch_size=2, **arguments),
                noise_multiplier=1.0, max_grad_norm=1.0,
            )  # fmt: skip


def test_several_processes_or_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="DataParallel.*grad_sample_mode='hooks'"):
        made_private(nn.DataParallel(nn.Linear(3, 2)), values(4, 3).float())


# --- parameters that come and go -------------------------------------------------------------


def test_a_parameter_unfrozen_later_is_private_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    model[0].requires_grad_(False)
    x = values(4, 5).float()
    _, wrapped, optimizer, _ = made_private(model, x)
    step(wrapped, optimizer, x)
    assert model[0].weight.grad is None
    model[0].requires_grad_(True)
    expected = microbatching(model, squared_loss, (x,), 1.0)
    optimizer.zero_grad()
    squared_loss(wrapped, (x,)).backward()
    for name, p in model.named_parameters():
        assert relative_error(p.grad, expected.gradients[name]) < 1e-5
    optimizer.step()


def test_an_added_parameter_group_is_private_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    x = values(4, 5).float()
    model, optimizer, _ = PrivacyEngine().make_private(
        module=model, optimizer=torch.optim.SGD(model[2].parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(x), batch_size=4), noise_multiplier=0.0,
        max_grad_norm=1.0,
    )  # fmt: skip
    added = model.to_standard_module()[0]
    expected = microbatching(nn.Sequential(*model._module), squared_loss, (x,), 1.0)
    wrapped = FusedGradSampleModule(model._module)
    wrapped.connect(optimizer)
    optimizer.original_optimizer.add_param_group({"params": list(added.parameters())})
    squared_loss(wrapped, (x,)).backward()
    assert relative_error(added.weight.grad, expected.gradients["0.weight"]) < 1e-5
