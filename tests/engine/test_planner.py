"""The planner: what it chooses, why, within which budget, and that every choice is right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from dpkernels import ops
from dpkernels.engine.module import FusedGradSampleModule
from dpkernels.engine.plan import planner, ridge_point
from dpkernels.engine.plan.planner import Planner
from dpkernels.engine.plan.strategies import held_by
from dpkernels.engine.plan.table import Plan
from dpkernels.layers.costs import STRATEGIES, Cost
from dpkernels.layers.operands import ConvOperand, EmbeddingOperand, LinearOperand
from dpkernels.ops.conv.geometry import Geometry
from tests.engine.support import made_private, squared_loss, values
from tests.engine.truth import assert_private

CPU = torch.device("cpu")


def linear(positions: int, inputs: int, outputs: int, batch: int = 3) -> LinearOperand:
    draw = torch.Generator().manual_seed(positions)
    a = torch.randn(batch, positions, inputs, generator=draw, dtype=torch.float64)
    return LinearOperand(a, torch.randn(batch, positions, outputs, generator=draw).double())


def conv(channels: int = 32, side: int = 2, batch: int = 3, rows: int = 3) -> ConvOperand:
    draw = torch.Generator().manual_seed(side)
    x = torch.randn(rows, channels, side, side, generator=draw).double()
    geometry = Geometry((channels, channels, 3, 3), (1, 1), (1, 1), (1, 1), 1)
    return ConvOperand(x, x.flip(1), geometry, batch)


def embedding(batch: int = 3) -> EmbeddingOperand:
    indices = torch.arange(batch * 4).reshape(batch, 4) % 3
    return EmbeddingOperand(indices, values(batch, 4, 5), 7, -1)


OPERANDS = {
    "sequence": linear(5, 40, 30),
    "long sequence": linear(90, 8, 9),
    "row": linear(1, 6, 7),
    "alone": linear(5, 6, 7, batch=1),
    "image": conv(),
    "folded image": conv(batch=1, rows=2),
    "embedding": embedding(),
}


def shape_of(operand: object) -> torch.Tensor:
    return operand.grad_sample()[0]


@pytest.mark.parametrize("name", OPERANDS)
def test_every_strategy_on_offer_gives_the_same_norms_and_sums(name: str) -> None:
    operand = OPERANDS[name]
    offers = operand.offers()
    assert set(offers) == set(STRATEGIES)
    grads = operand.grad_sample()
    factor = torch.linspace(0.2, 0.9, len(grads), dtype=torch.float64)
    expected = torch.tensordot(factor, grads, dims=1)
    for strategy, offer in offers.items():
        if not isinstance(offer, Cost):
            assert len(offer) > 10
            continue
        held = held_by(strategy, operand, grads[0])
        if isinstance(held, torch.Tensor):
            torch.testing.assert_close(held, grads)
            continue
        torch.testing.assert_close(held.norm_sq(), grads.flatten(1).square().sum(1))
        torch.testing.assert_close(held.clipped_grad(factor).reshape(expected.shape), expected)


def test_strategies_are_offered_where_they_are_sound() -> None:
    def offered(name: str) -> set[str]:
        return {s for s, o in OPERANDS[name].offers().items() if isinstance(o, Cost)}

    assert offered("sequence") == {"store", "gram", "recompute"}
    assert offered("long sequence") == {"store", "recompute"}
    assert offered("row") == {"store", "gram"}
    assert offered("alone") == {"gram", "recompute", "single"}
    assert offered("image") == {"store", "channel_gram", "recompute"}
    assert offered("folded image") == {"recompute", "single"}
    assert offered("embedding") == {"store", "gram"}


def planned(operands: dict[str, object], budget: int, plan: str = "auto") -> Planner:
    planner = Planner(budget, plan)
    for name, operand in operands.items():
        planner.choose(operand, name, name, shape_of(operand))
    planner.settle()
    return planner


def strategies(planner: Planner) -> dict[str, str]:
    return {e.parameter: e.choice.strategy for e in planner.entries.values()}


def test_the_budget_goes_where_a_byte_saves_the_most_work() -> None:
    """The first layer would take it all, were it not planned again at the end of the pass."""
    operands = {"first": linear(90, 40, 50), "second": linear(4000, 40, 50)}
    one = 3 * 40 * 50 * 8
    assert strategies(planned(operands, 2 * one)) == {"first": "store", "second": "store"}
    planner = Planner(one)
    first, second = (planner.choose(o, n, n, shape_of(o)).strategy for n, o in operands.items())
    assert (first, second) == ("store", "recompute")
    planner.settle()
    assert strategies(planner) == {"first": "recompute", "second": "store"}
    rows = {row["parameter"]: row for row in Plan(planner).rows}
    assert "memory_budget" in rows["first"]["why_not"]["store"]


def test_the_budget_holds_for_the_largest_batch() -> None:
    planner = planned({"a": linear(90, 40, 50)}, 3 * 40 * 50 * 8)
    assert strategies(planner) == {"a": "store"}
    choice = planner.choose(linear(90, 40, 50, batch=4), "a", "a", torch.zeros(50, 40))
    assert choice.strategy == "recompute"


@pytest.mark.parametrize("budget", [0, 10**9])
def test_a_parameter_used_twice_is_stored_from_the_second_pass_on(budget: int) -> None:
    planner = Planner(budget)
    operand = OPERANDS["sequence"]
    planner.choose(operand, "a", "a", shape_of(operand))
    planner.reused("a")
    planner.settle()
    assert strategies(planner) == {"a": "store"}
    assert "used several times" in Plan(planner).rows[0]["why"]


class Reused(nn.Module):
    """One layer twice, one weight in two layers, and a layer for long and one for short rows."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(6, 6)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.image = nn.Conv1d(5, 40, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.twice(self.twice(x).tanh())
        return self.image(self.second(self.first(x).tanh()))


@pytest.mark.parametrize("plan", ["auto", "measured"])
@pytest.mark.parametrize("budget", [0, 2500, 10**9])
@pytest.mark.parametrize("batch", [1, 3])
def test_any_budget_and_plan_gives_the_gradient_of_one_sample_at_a_time(
    monkeypatch: pytest.MonkeyPatch, plan: str, budget: int, batch: int
) -> None:
    """Also in later steps, when the plan was made again with reused parameters known."""
    torch.manual_seed(0)
    model, x = Reused().double(), values(batch, 5, 6)
    started = FusedGradSampleModule.__init__
    planners = []

    def init(self, m: nn.Module, **kwargs: object) -> None:
        started(self, m, **{**kwargs, "memory_budget": budget, "plan": plan})
        self.planner, kept = (planners[0] if planners else self.planner), self.planner
        planners.append(kept)

    monkeypatch.setattr(FusedGradSampleModule, "__init__", init)
    for _ in range(2):
        assert_private(model, squared_loss, (x,))
    chosen = strategies(planners[0])
    assert chosen["twice.weight"] == chosen["first.weight"] == ("store" if batch > 1 else "single")


def test_measured_takes_what_was_fastest_and_names_the_backend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a clock that goes faster for one backend."""
    operand = OPERANDS["sequence"]
    cost = {"cpu": 3.0, "library": 1.0, "reference": 0.5}
    op = ops.linear_norm_sq
    monkeypatch.setattr(type(op), "candidates", lambda self, *args: ("cpu", "library"))
    monkeypatch.setattr(
        "dpkernels.engine.plan.planner._time",
        lambda candidate, *_: cost[candidate[1]] * (1 + STRATEGIES.index(candidate[0])),
    )
    planner = planned({"a": operand}, 10**9, "measured")
    row = Plan(planner).rows[0]
    assert (row["strategy"], row["backend"]) == ("store", "library")
    assert "measured" in row["why"]
    tight = planned({"a": operand}, 0, "measured")
    assert strategies(tight) == {"a": "gram"}
    assert "was not timed" in Plan(tight).rows[0]["why_not"]["store"]


def test_explain_states_costs_and_why_not_the_others() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Flatten(), nn.Linear(20, 3))
    engine, model, _, _ = made_private(model, torch.randn(8, 4, 6))
    model(torch.randn(8, 4, 6)).square().mean().backward()
    plan = engine.explain()
    assert {row["parameter"] for row in plan.rows} == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert sum(row["share"] for row in plan.rows) == pytest.approx(1.0)
    for row in plan.rows:
        assert set(row["why_not"]) == set(STRATEGIES) - {row["strategy"]}
        assert all(row["why_not"].values())
        assert row["flops"] > 0
        assert row["bytes"] > 0
    assert "only convolutions" in str(plan)


@pytest.mark.parametrize(("name", "value"), [("plan", "fast"), ("memory_budget", -1)])
def test_bad_arguments_are_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        made_private(nn.Linear(3, 2), torch.randn(8, 3), **{name: value})


@pytest.fixture
def fresh_ridge(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("DPKERNELS_RIDGE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ridge_point._cached.cache_clear()
    yield tmp_path / "dpkernels" / "ridge.json"
    ridge_point._cached.cache_clear()


def test_the_ridge_point_is_measured_once_and_kept(
    monkeypatch: pytest.MonkeyPatch, fresh_ridge: Path
) -> None:
    measured = ridge_point.ridge_point(CPU)
    assert 0.1 < measured < 1000.0
    assert list(json.loads(fresh_ridge.read_text()).values()) == [measured]
    ridge_point._cached.cache_clear()
    monkeypatch.setattr(ridge_point, "measure", lambda *_: pytest.fail("measured again"))
    assert ridge_point.ridge_point(CPU) == measured


def test_a_cache_that_cannot_be_written_leaves_the_table(
    monkeypatch: pytest.MonkeyPatch, fresh_ridge: Path
) -> None:
    fresh_ridge.parent.write_text("a file where the folder should be")
    assert ridge_point.ridge_point(CPU) == 10.0


@pytest.mark.parametrize("content", ["{", "[]", '{"x": "fast"}'])
def test_a_damaged_cache_is_replaced(
    monkeypatch: pytest.MonkeyPatch, fresh_ridge: Path, content: str
) -> None:
    fresh_ridge.parent.mkdir()
    fresh_ridge.write_text(content)
    monkeypatch.setattr(ridge_point, "measure", lambda *_: 7.5)
    assert ridge_point.ridge_point(CPU) == 7.5
    assert list(json.loads(fresh_ridge.read_text()).values()) == [7.5]


def test_the_ridge_point_can_be_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPKERNELS_RIDGE", "42")
    assert ridge_point.ridge_point(CPU) == 42.0
    monkeypatch.setenv("DPKERNELS_RIDGE", "quick")
    with pytest.raises(ValueError, match="DPKERNELS_RIDGE='quick'"):
        ridge_point.ridge_point(CPU)


def test_each_kind_of_product_has_a_ridge_point_of_its_own(
    monkeypatch: pytest.MonkeyPatch, fresh_ridge: Path
) -> None:
    measured = {"float32": 9.0, "float64": 4.5}
    monkeypatch.setattr(ridge_point, "measure", lambda device, kind: measured[kind])
    assert {kind: ridge_point.ridge_point(CPU, kind) for kind in measured} == measured
    assert sorted(json.loads(fresh_ridge.read_text()).values()) == [4.5, 9.0]


GPU = torch.device("cuda", 0)


def test_what_a_gpu_multiplies_depends_on_dtype_and_switches() -> None:
    """The defaults of PyTorch: TF32 in convolutions, not in matrix products."""
    kinds = [
        (torch.bfloat16, False, "bfloat16"),
        (torch.float16, True, "float16"),
        (torch.float64, True, "float64"),
        (torch.float32, False, "float32"),
        (torch.float32, True, "tf32"),
    ]
    for dtype, convolution, kind in kinds:
        assert ridge_point.kind_of_products(GPU, dtype, convolution) == kind
        assert ridge_point.ridge_point(GPU, kind) == ridge_point._TABLE["cuda"][kind]
    assert ridge_point.kind_of_products(CPU, torch.bfloat16) == "float32"
    # what is not measured as it is multiplied is taken from the table
    assert not ridge_point._rounded(GPU, "float32")
    assert ridge_point.kind_of_products(CPU, torch.float64) == "float64"
    torch.set_float32_matmul_precision("high")
    try:
        assert ridge_point.kind_of_products(GPU, torch.float32) == "tf32"
        assert ridge_point._rounded(GPU, "float32")
        assert not ridge_point._rounded(GPU, "bfloat16")
    finally:
        torch.set_float32_matmul_precision("highest")


def test_tf32_counts_as_half_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no switch is moved while somebody trains."""
    monkeypatch.setitem(ridge_point._PROBES, "cpu", (64, 1 << 16, 2))
    monkeypatch.setitem(ridge_point._TABLE["cpu"], "bfloat16", 130.0)
    monkeypatch.setattr(ridge_point, "_seconds", lambda run, device, repeats: 1e-6)
    whole = ridge_point.measure(CPU, "bfloat16")
    assert 130.0 / ridge_point._CREDIBLE <= whole <= 130.0 * ridge_point._CREDIBLE
    assert ridge_point.measure(CPU, "tf32") == whole / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_planner_asks_for_the_kind_that_the_operands_are(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(planner, "ridge_point", lambda device, kind: asked.append(kind) or 10.0)
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Flatten(), nn.Linear(18, 2)).to(dtype)
    x = torch.randn(4, 2, 8, dtype=dtype)
    _, wrapped, _, _ = made_private(model, x)
    squared_loss(wrapped, (x,)).backward()
    assert set(asked) == {str(dtype).removeprefix("torch.")}


def test_memory_that_the_allocator_holds_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first step of another network most of a GPU is the allocator's, and unused."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 60 << 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 24 << 30)
    assert planner.default_memory_budget(GPU) == 10 << 30
