"""Number formats: autocast, half-precision models, float64, and fp16 with a GradScaler."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from dpkernels import ops
from tests.engine.support import made_private, squared_loss, values
from tests.engine.truth import assert_same, fused, microbatching, relative_error

#: relative error that one rounding of inputs, weights and backprops each may leave
TOLERANCE = {torch.bfloat16: 2.0**-5, torch.float16: 2.0**-8}


def network() -> nn.Module:
    """Factored (T = 1) and stored operands, weights, biases, an affine layer."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv1d(2, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.ReLU(), nn.Flatten(),
        nn.Linear(48, 5), nn.Tanh(), nn.Linear(5, 3),
    )  # fmt: skip


X = values(6, 2, 8).float()
#: clips some of the samples of X and not all
BOUND = 3.4


def float64_truth(samples: torch.Tensor = X, **kwargs: float):
    model = network().double()
    return microbatching(model, squared_loss, (samples.double(),), BOUND, **kwargs)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters()}


def assert_close_to_truth(found: dict[str, torch.Tensor], expected, tolerance: float) -> None:
    flat = torch.cat([g.double().flatten() for g in found.values()])
    truth = torch.cat([g.double().flatten() for g in expected.gradients.values()])
    assert relative_error(flat, truth) < tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision(dtype: torch.dtype, autocast: bool) -> None:
    """Sums and norms are float32 whatever the layers compute in, and near the float64 truth."""
    model = network() if autocast else network().to(dtype)
    x = X if autocast else X.to(dtype)
    _, wrapped, optimizer, _ = made_private(model, x, max_grad_norm=BOUND)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        output = wrapped(x)
    squared_loss(lambda _: output.float(), (x,)).backward()
    report = optimizer.last_step
    assert report.per_sample_norm.dtype == report.clip_factor.dtype == torch.float32
    assert all(p.summed_grad.dtype == torch.float32 for p in model.parameters())
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32 if autocast else dtype}
    expected = float64_truth()
    assert 0 < (expected.norms > BOUND).sum() < len(X)
    assert_close_to_truth(gradients(model), expected, TOLERANCE[dtype])
    assert relative_error(report.per_sample_norm, expected.norms) < TOLERANCE[dtype]


def test_float64_stays_float64() -> None:
    model = network().double()
    found = fused(model, squared_loss, (X.double(),), BOUND)
    assert found.norms.dtype == torch.float64
    assert_same(found, float64_truth(), 1e-12)


def scaler_of(scale: float = 2.0**16, **kwargs: object) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1, **kwargs)


@pytest.mark.parametrize("clipping", ["flat", "automatic"])
@pytest.mark.parametrize("scale", [2.0**16, 1000.0])
def test_the_scale_comes_off_before_norms(scale: float, clipping: str) -> None:
    """The whole loop of PyTorch's own recipe, against the same loop without a scaler."""
    plain = network().double()
    scaled = copy.deepcopy(plain)
    x = X.double()
    _, model, optimizer, _ = made_private(plain, x, clipping=clipping)
    scaler = scaler_of(scale)
    engine, other, scaled_optimizer, _ = made_private(
        scaled, x, clipping=clipping, grad_scaler=scaler
    )
    for _ in range(3):
        optimizer.zero_grad()
        squared_loss(model, (x,)).backward()
        scaled_optimizer.zero_grad()
        scaler.scale(squared_loss(other, (x,))).backward()
        norms = scaled_optimizer.last_step.per_sample_norm
        assert relative_error(norms, optimizer.last_step.per_sample_norm) < 1e-12
        optimizer.step()
        scaler.step(scaled_optimizer)
        scaler.update()
    for p, q in zip(plain.parameters(), scaled.parameters(), strict=True):
        assert relative_error(q.detach(), p.detach()) < 1e-12
    assert scaler.get_scale() == scale, "the scale may not follow private gradients"
    assert engine.accountant.history[0][2] == 3


def test_fp16_autocast_with_a_scaler() -> None:
    """Gradients that underflow in fp16 without a scaler arrive with one."""
    tiny = 2.0**-20
    expected = microbatching(
        network().double(), lambda m, b: tiny * squared_loss(m, b), (X.double(),), BOUND * tiny
    )
    errors = []
    for scaler in (None, scaler_of(2.0**16)):
        model = network()
        _, wrapped, optimizer, _ = made_private(
            model, X, max_grad_norm=BOUND * tiny, grad_scaler=scaler
        )
        with torch.autocast("cpu", dtype=torch.float16):
            output = wrapped(X)
        loss = tiny * squared_loss(lambda _, o=output: o.float(), (X,))
        (loss if scaler is None else scaler.scale(loss)).backward()
        found = torch.cat([p.grad.double().flatten() for p in model.parameters()])
        truth = torch.cat([g.flatten() for g in expected.gradients.values()])
        errors.append(relative_error(found, truth))
    assert errors[1] < TOLERANCE[torch.float16] < errors[0]


def overflowing(x: torch.Tensor) -> torch.Tensor:
    """A batch whose sample 2 has gradients beyond the largest fp16 number."""
    x = x.clone()
    x[2] *= 1e4
    return x


def layer_of_one_row() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))


def layer_of_rows() -> nn.Module:
    return nn.Sequential(nn.Conv1d(2, 6, 3), nn.Conv1d(6, 2, 3))


@pytest.mark.parametrize("build", [layer_of_one_row, layer_of_rows])
@pytest.mark.parametrize("materialize", [False, True])
def test_a_sample_that_overflows_counts_as_zero(
    build: Callable[[], nn.Module], materialize: bool
) -> None:
    """Its neighbours' sum is released, the step is taken, and the scale stays."""
    torch.manual_seed(1)
    model = build().half()
    expected = microbatching(
        copy.deepcopy(model).double(), squared_loss, (X[[0, 1, 3, 4, 5]].half().double(),), BOUND,
        expected_batch_size=6,
    )  # fmt: skip
    scaler = scaler_of(256.0)
    engine, wrapped, optimizer, _ = made_private(
        model,
        X.half(),
        max_grad_norm=BOUND,
        grad_scaler=scaler,
        materialize_grad_samples=materialize,
        memory_budget=0,
    )
    x = overflowing(X).half()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.warns(UserWarning, match="1 of 6 samples"):
        scaler.scale(squared_loss(lambda b: wrapped(b).float(), (x,))).backward()
    strategies = {row["strategy"] for row in engine.explain().rows}
    assert "store" in strategies
    assert strategies & {"gram", "recompute"}
    assert optimizer.last_step.clip_factor[2] == 0
    assert (optimizer.last_step.clip_factor[[0, 1, 3, 4, 5]] > 0).all()
    assert_close_to_truth(gradients(model), expected, TOLERANCE[torch.float16])
    scaler.step(optimizer)
    scaler.update()
    assert all(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert scaler.get_scale() == 256.0
    assert len(engine.accountant) == 1


def test_a_scaler_the_engine_does_not_know_is_refused() -> None:
    for attached in (None, scaler_of(4.0)):
        _, model, optimizer, _ = made_private(nn.Linear(8, 3), X[:, 0], grad_scaler=attached)
        scaler = scaler_of(8.0)
        scaler.scale(squared_loss(model, (X[:, 0],))).backward()
        with pytest.raises(ValueError, match="GradScaler.*grad_scaler=scaler.*bfloat16 autocast"):
            scaler.step(optimizer)


@pytest.mark.parametrize("known", [True, False])
def test_unscaling_by_hand_is_refused(known: bool) -> None:
    """Nothing may divide a gradient that is private and unscaled, by a bare step() or not."""
    scaler = scaler_of()
    _, model, optimizer, _ = made_private(
        nn.Linear(8, 3), X[:, 0], grad_scaler=scaler if known else None
    )
    scaler.scale(squared_loss(model, (X[:, 0],))).backward()
    weight = model.get_parameter("_module.weight")
    released = weight.grad.clone()
    with pytest.raises(ValueError, match="unscale_.*drop the call"):
        scaler.unscale_(optimizer)
    assert torch.equal(weight.grad, released)


def test_a_scaler_that_is_off_changes_nothing() -> None:
    for attach in (True, False):
        off = torch.amp.GradScaler("cpu", enabled=False)
        _, model, optimizer, _ = made_private(
            nn.Linear(8, 3), X[:, 0], grad_scaler=off if attach else None
        )
        off.scale(squared_loss(model, (X[:, 0],))).backward()
        off.unscale_(optimizer)
        off.step(optimizer)
        off.update()
        optimizer.zero_grad()
        infinite = X[:, 0].index_fill(0, torch.tensor(1), torch.inf)
        with pytest.raises(ValueError, match="sample 1.*not finite"):
            squared_loss(model, (infinite,)).backward()


def test_a_restored_scaler_stays_frozen() -> None:
    scaler = scaler_of(64.0)
    saved = {**scaler.state_dict(), "growth_factor": 2.0}
    _, model, optimizer, _ = made_private(nn.Linear(8, 3), X[:, 0], grad_scaler=scaler)
    scaler.load_state_dict(saved)
    for _ in range(3):
        optimizer.zero_grad()
        scaler.scale(squared_loss(model, (X[:, 0],))).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 64.0


def test_only_a_scaler_is_taken_and_only_in_our_mode() -> None:
    with pytest.raises(ValueError, match="grad_scaler: int, expected a torch.amp.GradScaler"):
        made_private(nn.Linear(8, 3), X[:, 0], grad_scaler=3)
    with pytest.raises(ValueError, match="grad_scaler: only grad_sample_mode"):
        made_private(nn.Linear(8, 3), X[:, 0], grad_scaler=scaler_of(), grad_sample_mode="hooks")


@pytest.mark.filterwarnings("error")
def test_nothing_is_said_while_all_is_finite() -> None:
    scaler = scaler_of(64.0)
    _, model, optimizer, _ = made_private(nn.Linear(8, 3), X[:, 0], grad_scaler=scaler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scaler.scale(squared_loss(model, (X[:, 0],))).backward()
        scaler.step(optimizer)


def encoder_of_two_kinds() -> nn.Module:
    """Grams over few positions, products of two norms, attention and a recurrent layer."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(40, 64), nn.Tanh(), nn.TransformerEncoderLayer(64, 2, 48, 0.0, batch_first=True),
        Last(nn.LSTM(64, 24, batch_first=True)), nn.Linear(24, 4),
    )  # fmt: skip


class Last(nn.Module):
    """The output of a recurrent layer at the last position."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)[0][:, -1]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("clipping", ["flat", "automatic"])
@pytest.mark.parametrize("positions", [1, 3])
def test_backward_inside_autocast_releases_no_more_than_the_bound(
    backend: str, clipping: str, positions: int
) -> None:
    """One sample, no noise: norms, factors and sums are formed in full precision all the same."""
    bound = 0.05
    for seed in range(6):
        torch.manual_seed(seed)
        x = torch.randn(1, positions, 40)
        _, model, _, _ = made_private(
            encoder_of_two_kinds(), x, max_grad_norm=bound, clipping=clipping
        )
        with ops.use_backend(backend), torch.autocast("cpu", torch.bfloat16):
            nn.functional.cross_entropy(model(x), torch.tensor([seed % 4])).backward()
        released = torch.cat([p.grad.double().flatten() for p in model.parameters()])
        assert 0.9 * bound < float(released.norm()) <= bound


def test_backward_inside_autocast_is_that_outside() -> None:
    """Where every product of the backward pass is the engine's own, bit for bit."""
    found = []
    for inside in (True, False):
        model = nn.Linear(16, 5)
        nn.init.normal_(model.weight, generator=torch.Generator().manual_seed(0))
        nn.init.zeros_(model.bias)
        x = X.flatten(1)
        _, wrapped, _, _ = made_private(model, x, max_grad_norm=BOUND)
        with torch.autocast("cpu", torch.bfloat16):
            loss = squared_loss(lambda _, m=wrapped, x=x: m(x).float(), (x,))
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        found.append([p.grad for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


_NEWER_SWITCHES = """
import operator, torch
from tests.engine.support import made_private, squared_loss
from tests.engine.test_precision import (
    BOUND, X, assert_close_to_truth, float64_truth, gradients, network
)
for name, value, tolerance in (
    ("fp32_precision", "tf32", 2.0**-9),
    ("fp32_precision", "bf16", 2.0**-6),
    ("cuda.matmul.fp32_precision", "tf32", 1e-4),
    ("cudnn.fp32_precision", "ieee", 1e-4),
):
    *owner, switch = name.split(".")
    backend = operator.attrgetter(".".join(owner))(torch.backends) if owner else torch.backends
    before = getattr(backend, switch)
    setattr(backend, switch, value)
    model = network()
    _, wrapped, optimizer, _ = made_private(model, X, max_grad_norm=BOUND)
    squared_loss(wrapped, (X,)).backward()
    assert_close_to_truth(gradients(model), float64_truth(), tolerance)
    optimizer.step()
    setattr(backend, switch, before)
"""


@pytest.mark.skipif(
    not hasattr(torch.backends.cudnn, "conv"), reason="fp32_precision is of PyTorch 2.9 and later"
)
def test_steps_under_the_newer_switches_of_precision() -> None:
    """In a process of its own: PyTorch forbids mixing them with the older ones."""
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", _NEWER_SWITCHES], cwd=root, check=True)
