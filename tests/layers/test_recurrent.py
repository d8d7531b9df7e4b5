"""LSTM, GRU and RNN by their own rule: every option against one sample at a time, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from opacus.layers import DPGRU, DPLSTM, DPRNN
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from dpkernels.engine.capture.layer_in_parts import PartsForward
from dpkernels.engine.module import FusedGradSampleModule
from dpkernels.layers.recurrent import RecurrentRule
from dpkernels.testing import assert_per_sample
from tests.engine.support import Call, made_private, squared_loss, values
from tests.engine.truth import assert_private, fused, microbatching

KINDS = [nn.LSTM, nn.GRU, nn.RNN]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no-bias": {"bias": False},
    "second-axis": {"batch_first": False},
    "two-layers-bidirectional": {"num_layers": 2, "bidirectional": True},
    "bidirectional-second-axis": {"batch_first": False, "bidirectional": True},
    "hidden-1": {"hidden_size": 1, "num_layers": 2},
}
SPECIAL: dict[str, tuple[type[nn.RNNBase], dict[str, Any]]] = {
    "projected": (nn.LSTM, {"proj_size": 2, "num_layers": 2, "bidirectional": True}),
    "projected-no-bias": (nn.LSTM, {"proj_size": 1, "bias": False, "batch_first": False}),
    "relu": (nn.RNN, {"nonlinearity": "relu", "num_layers": 2}),
}


def build(kind: type[nn.RNNBase], **options: Any) -> nn.RNNBase:
    return kind(5, **{"hidden_size": 4, "batch_first": True, **options})


def everything(module: nn.RNNBase, x: torch.Tensor, *state: Any) -> torch.Tensor:
    """[B, F]: outputs of all steps and last states; `x` has the sample axis first."""
    output, last = module(x if module.batch_first else x.transpose(0, 1), *state)
    output = output if module.batch_first else output.transpose(0, 1)
    states = last if isinstance(last, tuple) else (last,)
    return torch.cat([output.flatten(1), *(s.transpose(0, 1).flatten(1) for s in states)], 1)


@pytest.mark.parametrize("length", [6, 4, 1])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_padded(kind: type[nn.RNNBase], options: str, length: int) -> None:
    torch.manual_seed(0)
    module = build(kind, **OPTIONS[options])
    assert_private(Call(module, everything).double(), squared_loss, (values(4, length, 5),))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", [*KINDS, DPLSTM, DPGRU, DPRNN])
def test_variations(kind: type[nn.Module], batch_first: bool) -> None:
    torch.manual_seed(0)
    module = build(kind, batch_first=batch_first)
    assert_per_sample(module, None, (values(4, 3, 5),), batch_first=batch_first)


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("name", SPECIAL)
def test_options_of_one_kind(name: str, samples: int) -> None:
    torch.manual_seed(0)
    kind, options = SPECIAL[name]
    module = Call(build(kind, **options), everything).double()
    assert_private(module, squared_loss, (values(samples, 3, 5),))


@pytest.mark.parametrize("kind", KINDS)
def test_views_and_parts_that_are_frozen(kind: type[nn.RNNBase]) -> None:
    torch.manual_seed(0)
    module = build(kind, num_layers=2)
    module.weight_hh_l0.requires_grad_(False)
    module.bias_ih_l1.requires_grad_(False)
    model = nn.Sequential(nn.Linear(5, 5), Call(module, everything))
    assert_private(model.double(), squared_loss, (values(6, 3, 5),), views_per_sample=2)


class LearnedState(nn.Module):
    """The first states are made from the input, so gradients flow through them."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any):
        super().__init__()
        self.start = nn.Linear(5, 4)
        self.rest = build(kind, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.start(x[:, 0]).expand(self.rest.num_layers, -1, -1)
        state = (h, h.tanh()) if isinstance(self.rest, nn.LSTM) else h
        return everything(self.rest, x, state)


@pytest.mark.parametrize("options", ["plain", "second-axis"])
@pytest.mark.parametrize("kind", KINDS)
def test_first_states_that_are_given(kind: type[nn.RNNBase], options: str) -> None:
    torch.manual_seed(0)
    model = LearnedState(kind, **OPTIONS[options], num_layers=2)
    assert_private(model.double(), squared_loss, (values(4, 3, 5),))


class Packs(nn.Module):
    """Packs by lengths inside the model; returns padded outputs and last states."""

    def __init__(self, module: nn.RNNBase, sort: bool):
        super().__init__()
        self.layer, self.sort = module, sort

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=self.sort)
        output, last = self.layer(packed)
        padded, _ = pad_packed_sequence(output, batch_first=True, total_length=x.shape[1])
        states = last if isinstance(last, tuple) else (last,)
        return torch.cat([padded.flatten(1), *(s.transpose(0, 1).flatten(1) for s in states)], 1)


def packed_loss(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return (model(*batch) - 0.3).square().sum(1).mean()


@pytest.mark.parametrize("lengths", [[2, 5, 1, 3], [5, 4, 4, 1], [5, 5, 5, 5]])
@pytest.mark.parametrize("options", ["plain", "two-layers-bidirectional"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_inside_the_model(kind: type[nn.RNNBase], options: str, lengths: list[int]) -> None:
    torch.manual_seed(0)
    model = Packs(build(kind, **OPTIONS[options]), sort=lengths == sorted(lengths, reverse=True))
    assert_private(model.double(), packed_loss, (values(4, 5, 5), torch.tensor(lengths)))


@pytest.mark.parametrize("lengths", [[2, 5, 1, 3], [5, 5, 5, 5]])
@pytest.mark.parametrize("options", ["two-layers-bidirectional", "projected"])
def test_single_precision_has_steps_of_its_own(options: str, lengths: list[int]) -> None:
    """Compiled ones on a CPU (csrc/cpu/recurrence.cpp), held against the loop in float64."""
    torch.manual_seed(0)
    chosen = OPTIONS[options] if options in OPTIONS else SPECIAL[options][1]
    model = Packs(build(nn.LSTM, **{"hidden_size": 37, **chosen}), sort=lengths[0] == 5)
    batch = values(4, 5, 5).float(), torch.tensor(lengths)
    found = fused(model, packed_loss, batch, 0.5)
    exact = microbatching(model.double(), packed_loss, (batch[0].double(), batch[1]), 0.5)
    torch.testing.assert_close(found.norms.double(), exact.norms, rtol=1e-5, atol=0)
    for name, gradient in exact.gradients.items():
        size = float(gradient.abs().max())
        actual = found.gradients[name].double()
        torch.testing.assert_close(actual, gradient, rtol=0, atol=1e-4 * size)


@pytest.mark.parametrize("lengths", [[2, 5, 1, 3], [5, 4, 4, 1]])
def test_packed_sequences_pass_the_trial_run(lengths: list[int]) -> None:
    """One sample replaced by another is one of another length; sorted lengths must stay sorted."""
    model = Packs(build(nn.LSTM), sort=lengths[0] == 5)
    x, lengths = values(4, 5, 5).float(), torch.tensor(lengths)
    _, wrapped, optimizer, _ = made_private(model, x)
    packed_loss(wrapped, (x, lengths)).backward()
    optimizer.step()


def test_a_packed_sequence_as_the_models_input() -> None:
    torch.manual_seed(0)
    lengths = [2, 5, 1, 3]
    x = values(4, 5, 5).float()
    packed = pack_padded_sequence(x, torch.tensor(lengths), batch_first=True, enforce_sorted=False)
    model = Call(build(nn.GRU), lambda m, x: m(x)[1][0])
    expected = microbatching(
        Call(model.module, lambda m, rows: m(rows[0][:, : lengths[rows[1]]])[1][0]),
        lambda m, batch: m((batch[0], int(batch[1]))).square().sum(1).mean(),
        (x, torch.arange(4)),
        1.0,
    )
    _, wrapped, optimizer, _ = made_private(model, x)
    wrapped(packed).square().sum(1).mean().backward()
    torch.testing.assert_close(optimizer.last_step.per_sample_norm, expected.norms)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected.gradients[name])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bias": False}])
@pytest.mark.parametrize("kind", [DPLSTM, DPGRU, DPRNN])
def test_opacus_own_layers(kind: type[nn.Module], options: dict[str, Any], packed: bool) -> None:
    torch.manual_seed(0)
    module = kind(5, 4, batch_first=True, **options)
    model = Packs(module, False) if packed else Call(module, everything)
    x = values(4, 5, 5)
    batch = (x, torch.tensor([2, 5, 1, 3])) if packed else (x,)
    loss = packed_loss if packed else squared_loss
    tolerance = 1e-6 if packed else 1e-9  # Opacus keeps last states of packed input in float32
    assert_private(model.double(), loss, batch, tolerance=tolerance)
    captured = made_private(copy.deepcopy(model), x)[1]
    torch.testing.assert_close(captured(*batch), model(*batch), rtol=tolerance, atol=tolerance)


def test_opacus_dropout_at_every_step_runs_as_it_is() -> None:
    layer = DPLSTM(5, 4, num_layers=2, dropout=0.5, batch_first=True)
    installed = FusedGradSampleModule(layer)._installed
    assert not any(type(f) is PartsForward for f in installed)


def test_steps_taken_for_samples_are_found() -> None:
    """The data of a PackedSequence has a row per step: no layer may take it for samples."""

    def steps(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        lengths = torch.full((len(x),), x.shape[1])
        output = module["rnn"](pack_padded_sequence(x, lengths, batch_first=True))[0]
        return module["head"](output.data).reshape(len(x), -1)

    parts = nn.ModuleDict({"rnn": build(nn.RNN), "head": nn.Linear(4, 2)})
    x = values(4, 3, 5).float()
    with pytest.raises(ValueError, match=r"'module.head'.*move when sample"):
        made_private(Call(parts, steps), x)[1](x)


def test_every_kind_runs_by_its_rule() -> None:
    """Not by the fallback, which would be right too; a subclass with its own forward may be."""

    class Own(nn.GRU):
        def forward(self, *args: Any) -> Any:
            return super().forward(*args)

    model = nn.ModuleList([*(build(kind) for kind in KINDS), Own(5, 4)])
    wrapped = FusedGradSampleModule(model)
    kinds = {f.name: type(f) is PartsForward for f in wrapped._installed}
    assert [kinds[name] for name in "0123"] == [True, True, True, False]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_those_of_the_layer(kind: type[nn.RNNBase], packed: bool) -> None:
    torch.manual_seed(0)
    plain = build(kind, num_layers=2, bidirectional=True)
    captured = copy.deepcopy(plain)
    _, model, _, _ = made_private(captured, values(4, 5, 5).float())
    x: Any = values(4, 5, 5).float()
    if packed:
        lengths = torch.tensor([2, 5, 1, 3])
        x = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    (expected, expected_last), (actual, actual_last) = plain(x), model(x)
    if packed:
        assert isinstance(actual, PackedSequence)
        torch.testing.assert_close(actual.batch_sizes, expected.batch_sizes)
        expected, actual = expected.data, actual.data
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(actual_last, expected_last)
    assert actual.stride() == expected.stride()


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_between_layers_and_not_after_the_last(kind: type[nn.RNNBase]) -> None:
    torch.manual_seed(0)
    x = torch.ones(400, 2, 5)
    module = build(kind, num_layers=2, dropout=0.5, hidden_size=8)
    with torch.no_grad():
        module.weight_ih_l1.fill_(0.1)
    plain = copy.deepcopy(module)
    _, model, _, _ = made_private(module, x)
    expected, actual = plain(x)[0].double(), model(x)[0].double()
    deviation = float((expected.mean((0, 1)) - actual.mean((0, 1))).abs().max())
    assert deviation < 6 * float(expected.std(0).max()) / 400**0.5
    spread = float((actual.std(0) / expected.std(0)).mean())
    assert 0.85 < spread < 1.15
    assert float((actual == 0).double().mean()) < 0.01


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.rnn = nn.Linear(5, 5), build(nn.LSTM)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            call: Callable[..., torch.Tensor] = lambda x: self.rnn(x)[0]  # noqa: E731
            return checkpoint(call, self.stem(x), use_reentrant=reentrant)

    torch.manual_seed(0)
    assert_private(Checkpointed().double(), squared_loss, (values(4, 3, 5),))


def test_called_twice_the_gradients_add_up() -> None:
    torch.manual_seed(0)
    twice = Call(nn.GRU(5, 5, batch_first=True), lambda m, x: m(m(x)[0].flip(1))[0])
    assert_private(twice.double(), squared_loss, (values(4, 3, 5),))


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_is_as_accurate_as_bfloat16(kind: type[nn.RNNBase]) -> None:
    torch.manual_seed(0)

    def loss(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=model.training):
            output = model(batch[0])
        return (output.float() - 0.3).square().flatten(1).sum(1).mean()

    model = Call(build(kind, hidden_size=8), everything)
    x = values(6, 5, 5).float()
    expected = microbatching(copy.deepcopy(model).eval(), loss, (x,), 1.0)
    actual = fused(model, loss, (x,), 1.0)
    torch.testing.assert_close(actual.norms, expected.norms, rtol=3e-2, atol=0)
    for name, gradient in expected.gradients.items():
        error = float((actual.gradients[name] - gradient).norm() / gradient.norm())
        assert error < 5e-2, name


def test_saliency_passes_by_and_second_derivatives_are_refused() -> None:
    x = values(4, 3, 5).float().requires_grad_()
    _, model, _, _ = made_private(Call(build(nn.LSTM), everything), x.detach())
    (saliency,) = torch.autograd.grad(model(x).sum(), x)
    assert float(saliency.abs().min()) > 0
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ValueError, match="create_graph"):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)


@pytest.mark.parametrize("shape", [(4, 5), (4, 0, 5), (4, 3, 6)])
def test_inputs_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises((ValueError, RuntimeError), match="no sample axis|larger than 0|input"):
        made_private(build(nn.LSTM), torch.zeros(4, 3, 5))[1](torch.zeros(shape))


def test_a_wrong_recurrence_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison sees a state that is one step off."""
    run = RecurrentRule._direction

    def shifted(self: Any, module: Any, name: str, layout: Any, data: Any, *rest: Any) -> Any:
        output, *states = run(self, module, name, layout, data, *rest)
        return output * 1.001, *states

    monkeypatch.setattr(RecurrentRule, "_direction", shifted)
    with pytest.raises(AssertionError):
        assert_private(Call(build(nn.GRU), everything).double(), squared_loss, (values(4, 3, 5),))
