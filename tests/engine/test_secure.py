"""``secure_mode=True``: integers from clipped gradients to the noise, sensitivity on the grid."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable

import pytest
import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dpkernels import PrivacyEngine
from dpkernels.engine.processes.collectives import Processes
from dpkernels.engine.release import secure
from dpkernels.engine.release.clipping import Clipping
from dpkernels.engine.release.optimizer import FusedDPOptimizer
from dpkernels.engine.release.secure import Grid, rounded_sum
from dpkernels.engine.sampling import SystemPoissonSampler
from dpkernels.ops.noise.table import VARIANCE
from tests.engine.support import squared_loss, values
from tests.engine.truth import microbatching, relative_error

X = values(6, 2, 8).float()
BOUND = 3.4


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv1d(2, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.ReLU(), nn.Flatten(),
        nn.Linear(48, 5), nn.Tanh(), nn.Linear(5, 3),
    )  # fmt: skip


def private(
    model: nn.Module, x: torch.Tensor = X, noise: float = 1.0, **kwargs: object
) -> tuple[nn.Module, FusedDPOptimizer, DataLoader, PrivacyEngine]:
    engine = PrivacyEngine(secure_mode=True)
    batch = int(kwargs.pop("batch_size", len(x)))
    arguments = {"noise_multiplier": noise, "max_grad_norm": BOUND, **kwargs}
    wrapped, optimizer, loader = engine.make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(x), batch_size=batch), **arguments,
    )  # fmt: skip
    return wrapped, optimizer, loader, engine


@pytest.fixture
def no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secure, "discrete_gaussian_noise_", lambda total, key, block: total)


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.double().flatten() for p in model.parameters()])


@pytest.mark.usefixtures("no_noise")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_sum_is_that_of_one_sample_at_a_time(dtype: torch.dtype) -> None:
    model = network().to(dtype)
    wrapped, optimizer, _, _ = private(model, X.to(dtype))
    squared_loss(wrapped, (X.to(dtype),)).backward()
    truth = microbatching(network().double(), squared_loss, (X.double(),), BOUND)
    assert 0 < (truth.norms > BOUND).sum() < len(X)
    expected = torch.cat([g.flatten() for g in truth.gradients.values()])
    assert relative_error(flat(model), expected) < 1e-5
    assert {p.grad.dtype for p in model.parameters()} == {dtype}


def test_what_is_released_lies_on_the_grid_and_hides_nothing_more() -> None:
    """In float64 the integers can be read back; in float32 gradients are a function of them."""
    model = network().double()
    wrapped, optimizer, _, _ = private(model, X.double())
    squared_loss(wrapped, (X.double(),)).backward()
    grid = optimizer.private_sum.grid
    steps = flat(model) * len(X) / grid.width
    assert steps.abs().max() > 1e6
    assert ((steps - steps.round()).abs() < 1e-4).all()
    single = network()
    wrapped, optimizer, _, _ = private(single)
    squared_loss(wrapped, (X,)).backward()
    for p in single.parameters():
        exact = optimizer.private_sum.integers[p].double() * (
            optimizer.private_sum.grid.width / len(X)
        )
        assert torch.equal(p.grad, exact.float())


@pytest.mark.parametrize("noise", [1.0, 1e4])
def test_noise_has_the_deviation_of_the_sensitivity_on_the_grid(noise: float) -> None:
    """std / C_grid is the noise multiplier that is counted, also where rounding costs 5 %."""
    model = nn.Linear(400, 250)
    _, optimizer, _, engine = private(model, values(4, 400).float(), noise=noise, max_grad_norm=1.0)
    optimizer.make_private_noise_only()
    released = flat(model) * 4
    count = len(released)
    grid = optimizer.private_sum.grid
    assert grid.sensitivity == pytest.approx(1.0 + grid.width * math.sqrt(count) / 2, rel=1e-5)
    error = 5 / math.sqrt(2 * count)
    assert abs(float(released.std()) / (noise * grid.sensitivity) - 1) < error
    assert abs(float(released.mean())) < 5 * noise / math.sqrt(count) * 1.1
    if noise > 1e3:
        assert grid.sensitivity > 1.04 > 1 + 2 * error
    optimizer.step()
    assert engine.accountant.history == [(noise, 1.0, 1)]


@pytest.mark.parametrize("width", [1e-6, 0.03, 1.0])
def test_integers_of_a_sample_stay_within_the_sensitivity(width: float) -> None:
    """|rounded| <= C / width + sqrt(D) / 2, for vectors that rounding pushes outwards too."""
    torch.manual_seed(0)
    count = 10_000
    directions = torch.randn(3, count, dtype=torch.float64)
    directions[1] = 1.0
    directions[2] = 0.0
    directions[2, 0] = 1.0
    directions *= 1.0 / directions.norm(dim=1, keepdim=True)
    weight = torch.full((3,), 1.0 / width, dtype=torch.float64)
    total, squares = rounded_sum(directions, weight)
    assert (squares.sqrt() <= 1.0 / width + math.sqrt(count) / 2).all()
    rounded = (directions / width).round()
    assert torch.equal(total, rounded.to(torch.int64).sum(0))
    torch.testing.assert_close(squares, rounded.square().sum(1))


def test_grid_bounds_what_rounding_adds() -> None:
    for noise, bound, dimension in ((1.0, 1.0, 10**8), (1e-3, 7.0, 3), (50.0, 1e-6, 10**6)):
        grid = Grid(noise, bound, dimension)
        assert grid.sensitivity >= bound * (1 + 2**-19) + grid.width * math.sqrt(dimension) / 2
        assert grid.steps * noise <= math.sqrt(VARIANCE - 4)


@pytest.mark.usefixtures("no_noise")
def test_neighbours_differ_by_one_samples_integers_exactly() -> None:
    """With a sample at a time, sums of integers forget the order, and removing one is exact."""

    def integers(order: list[int]) -> list[torch.Tensor]:
        model = network()
        wrapped, optimizer, _, _ = private(model, loss_reduction="sum")
        for position, sample in enumerate(order):
            optimizer.signal_skip_step(position + 1 < len(order))
            squared_loss(wrapped, (X[sample : sample + 1],)).backward()
            if position + 1 < len(order):
                optimizer.step()
                optimizer.zero_grad()
        steps = optimizer.private_sum.grid.steps
        return [optimizer.private_sum.integers[p] for p in model.parameters()], steps

    whole, steps = integers([0, 1, 2, 3, 4, 5])
    shuffled, _ = integers([5, 3, 1, 0, 2, 4])
    assert all(torch.equal(a, b) for a, b in zip(whole, shuffled, strict=True))
    without, _ = integers([0, 1, 3, 4, 5])
    alone, _ = integers([2])
    assert all(torch.equal(a - b, c) for a, b, c in zip(whole, without, alone, strict=True))
    assert sum(float(a.double().square().sum()) for a in alone) <= steps**2


@pytest.mark.usefixtures("no_noise")
@pytest.mark.parametrize("physical", [1, 2, 6])
def test_physical_batches_add_up(physical: int) -> None:
    model = network()
    wrapped, optimizer, loader, engine = private(model, poisson_sampling=False)
    expected = microbatching(network().double(), squared_loss, (X.double(),), BOUND)
    before = [p.detach().clone() for p in model.parameters()]
    with BatchMemoryManager(
        data_loader=loader, max_physical_batch_size=physical, optimizer=optimizer
    ) as parts:
        for (x,) in parts:
            optimizer.zero_grad()
            squared_loss(wrapped, (x,)).backward()
            optimizer.step()
    assert engine.accountant.history[0][2] == 1
    moved = torch.cat([(b - p).flatten() for b, p in zip(before, model.parameters(), strict=True)])
    truth = torch.cat([g.flatten() for g in expected.gradients.values()])
    assert relative_error(moved.detach() / 0.1, truth) < 1e-5


@pytest.mark.usefixtures("no_noise")
def test_accumulated_backward_passes_add_up() -> None:
    model = network()
    wrapped, optimizer, _, _ = private(model, poisson_sampling=False)
    squared_loss(wrapped, (X[:3],)).backward()
    squared_loss(wrapped, (X[3:],)).backward()
    truth = microbatching(network().double(), squared_loss, (X.double(),), BOUND)
    expected = torch.cat([g.flatten() for g in truth.gradients.values()])
    assert relative_error(flat(model) * 2, expected) < 1e-5


@pytest.mark.usefixtures("no_noise")
def test_per_layer_and_automatic_clipping() -> None:
    for clipping, bound in (("per_layer", [0.7] * 8), ("automatic", 2.0)):
        models = network(), network()
        wrapped, optimizer, _, _ = private(models[0], clipping=clipping, max_grad_norm=bound)
        squared_loss(wrapped, (X,)).backward()
        plain, _, _ = PrivacyEngine().make_private(
            module=models[1], optimizer=torch.optim.SGD(models[1].parameters(), lr=0.1),
            data_loader=DataLoader(TensorDataset(X), batch_size=6), clipping=clipping,
            noise_multiplier=0.0, max_grad_norm=bound,
        )  # fmt: skip
        squared_loss(plain, (X,)).backward()
        assert relative_error(flat(models[0]), flat(models[1])) < 1e-5


def test_a_sample_beyond_the_bound_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sensitivity is checked on the integers themselves, whatever clipping did."""
    clip = Clipping.factors
    model = network()
    wrapped, optimizer, _, _ = private(model)
    monkeypatch.setattr(
        Clipping, "factors",
        lambda *args: {p: f * 1.0001 for p, f in clip(*args).items()},
    )  # fmt: skip
    with pytest.raises(ValueError, match="integers exceed the sensitivity.*nothing was released"):
        squared_loss(wrapped, (X,)).backward()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.usefixtures("no_noise")
def test_a_sample_that_overflows_is_not_read() -> None:
    model = nn.Linear(16, 3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    x = X.flatten(1).clone()
    wrapped, optimizer, _, _ = private(model, x, grad_scaler=scaler)
    x[2] = torch.inf
    with pytest.warns(UserWarning, match="1 of 6"):
        scaler.scale(squared_loss(wrapped, (x,))).backward()
    kept = x[[0, 1, 3, 4, 5]]
    torch.manual_seed(0)
    twin = copy.deepcopy(model)
    del twin.__dict__["forward"]
    truth = microbatching(
        twin.double(), squared_loss, (kept.double(),), BOUND, expected_batch_size=6
    )
    expected = torch.cat([g.flatten() for g in truth.gradients.values()])
    assert relative_error(flat(model), expected) < 1e-5


def test_training_runs_and_no_two_noises_are_alike() -> None:
    model = network()
    wrapped, optimizer, loader, engine = private(model, values(40, 2, 8).float(), batch_size=8)
    noises = []
    for (x,) in loader:
        optimizer.zero_grad()
        squared_loss(wrapped, (x,)).backward()
        optimizer.step()
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.make_private_noise_only()
        noises.append(flat(model))
    assert engine.accountant.history == [(1.0, 8 / 40, 5)]
    count = len(noises[0])
    first, second = (n / n.std() for n in noises)
    assert abs(float((first * second).mean())) < 5 / math.sqrt(count)
    assert abs(float((first[: count // 2] * first[-(count // 2) :]).mean())) < 10 / count**0.5


class Scaled(nn.Module):
    """Owns a parameter without axes, and one without values."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.none = nn.Parameter(torch.zeros(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale + self.none.sum()


@pytest.mark.usefixtures("no_noise")
def test_a_parameter_without_axes() -> None:
    model = Scaled()
    truth = microbatching(Scaled().double(), squared_loss, (X.double(),), BOUND)
    wrapped, _, _, _ = private(model)
    squared_loss(wrapped, (X,)).backward()
    assert relative_error(model.scale.grad.double(), truth.gradients["scale"]) < 1e-5


def test_copies_draw_noise_of_their_own() -> None:
    model = nn.Linear(3, 2)
    _, optimizer, _, _ = private(model, X[:, 0, :3])
    optimizer.make_private_noise_only()
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    twin.zero_grad()
    optimizer.zero_grad()
    twin.make_private_noise_only()
    optimizer.make_private_noise_only()
    assert not torch.equal(twin.params[0].grad, model.weight.grad)


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "no noise": (
        lambda: private(network(), noise=0.0)[1].make_private_noise_only(),
        "noise_multiplier=0.0",
    ),
    "hardly any": (lambda: Grid(1e-6, 1.0, 3), "expected at least|expects at least"),
    "far too much": (lambda: Grid(1e5, 1.0, 10**6), "more than double the sensitivity.*at most"),
    "adaptive": (
        lambda: private(
            network(), clipping="adaptive", target_unclipped_quantile=0.5,
            clipbound_learning_rate=0.2, max_clipbound=10.0, min_clipbound=0.1,
            unclipped_num_std=2.0,
        ),
        "adaptive.*not on the grid",
    ),
    "a seed": (
        lambda: private(network(), noise_generator=torch.Generator()),
        "seed is prohibited in secure mode",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(("name", "value"), [("noise_multiplier", 2.0), ("max_grad_norm", 9.0)])
def test_the_mechanism_of_a_logical_batch_stays(name: str, value: float) -> None:
    wrapped, optimizer, _, _ = private(network())
    optimizer.signal_skip_step(True)
    squared_loss(wrapped, (X,)).backward()
    optimizer.step()
    optimizer.zero_grad()
    setattr(optimizer, name, value)
    with pytest.raises(ValueError, match="logical batch began with"):
        squared_loss(wrapped, (X,)).backward()


def test_several_processes_are_refused() -> None:
    processes = Processes()
    processes.world_size = 2
    with pytest.raises(ValueError, match="secure_mode=True: 2 processes"):
        FusedDPOptimizer(
            torch.optim.SGD(network().parameters(), lr=0.1), noise_multiplier=1.0,
            max_grad_norm=1.0, expected_batch_size=4, processes=processes, secure_mode=True,
        )  # fmt: skip


def test_opacus_own_modes_ask_for_their_generator() -> None:
    with pytest.raises(ImportError, match="torchcsprng"):
        private(network(), grad_sample_mode="hooks")


def test_batches_are_drawn_by_the_operating_system() -> None:
    """Not from torch's generator, at the rate that is accounted, as many as planned."""
    _, _, loader, _ = private(network(), values(40, 2, 8).float(), batch_size=8)
    assert isinstance(loader.batch_sampler, SystemPoissonSampler)
    assert len(loader) == 5
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        drawn.append(list(loader.batch_sampler))
    assert drawn[0] != drawn[1]
    sampler = SystemPoissonSampler(num_samples=1000, sample_rate=0.3, steps=100)
    counts = torch.zeros(1000)
    for batch in sampler:
        assert batch == sorted(set(batch))
        counts[batch] += 1
    total = float(counts.sum())
    assert abs(total - 30_000) < 6 * math.sqrt(100_000 * 0.21)
    assert abs(float(counts.var()) - 21) < 6 * 21 * math.sqrt(2 / 1000)
    everyone = SystemPoissonSampler(num_samples=5, sample_rate=1.0, steps=2)
    assert list(everyone) == [[0, 1, 2, 3, 4]] * 2


def test_without_poisson_sampling_the_loader_is_kept() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, _, loader, _ = private(network(), poisson_sampling=False)
    assert type(loader) is DataLoader
