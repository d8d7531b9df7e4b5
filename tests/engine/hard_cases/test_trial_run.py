"""The trial run: batches that cannot tell, generators that it shares, mixing below its rounding."""

from __future__ import annotations

import random
from collections import UserDict
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from tests.engine.support import Call, ids, made_private, squared_loss, values


def _centred(model: nn.ModuleDict, x: torch.Tensor) -> torch.Tensor:
    hidden = model["first"](x)
    return model["second"](hidden - hidden.mean(0, keepdim=True))


def _two_layers() -> nn.ModuleDict:
    return nn.ModuleDict({"first": nn.Linear(5, 5), "second": nn.Linear(5, 3)})


def test_a_batch_that_is_all_alike_is_not_the_trial() -> None:
    """Zeros that a user runs through the model by hand show no mixing."""
    torch.manual_seed(0)
    x = values(4, 5).float()
    _, model, _, _ = made_private(Call(_two_layers(), _centred), x)
    model(torch.zeros(4, 5))
    with pytest.raises(ValueError, match=r"sample \d move"):
        model(x)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_batch_that_is_not_finite_is_not_the_trial(value: float) -> None:
    """One such sample moves everybody to the same NaN, and hides that samples mix."""
    torch.manual_seed(0)
    x = values(4, 5).float()
    broken = x.clone()
    broken[2, 0] = value
    _, model, _, _ = made_private(Call(_two_layers(), _centred), x)
    with pytest.raises(ValueError, match="not finite"):
        squared_loss(model, (broken,)).backward()
    with pytest.raises(ValueError, match=r"sample \d move"):
        model(x)


def test_a_model_with_infinities_of_its_own_is_tried_once() -> None:
    """No batch brings them: waiting for one without would mean a trial in every step."""
    calls: list[int] = []

    def unbounded(layers: nn.ModuleDict, x: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        hidden = layers["first"](x)
        hidden = torch.cat([hidden[:, 1:], torch.full_like(hidden[:, :1], torch.inf)], 1)
        return layers["second"](hidden).nan_to_num(posinf=0.0, neginf=0.0)

    x = values(4, 5).float()
    model = made_private(Call(_two_layers(), unbounded), x, trial="first")[1]
    model(x)
    assert len(calls) > 1
    calls.clear()
    model(x)
    assert len(calls) == 1


class _CentredGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
        return gradient - gradient.mean(0)


@pytest.mark.parametrize("where", ["activations", "backprops"])
def test_a_masked_class_hides_no_mixing(where: str) -> None:
    """Its output is -inf for every sample of every batch."""

    def masked(layers: nn.ModuleDict, x: torch.Tensor) -> torch.Tensor:
        mask = torch.tensor([0.0, 0.0, -torch.inf])
        if where == "activations":
            return _centred(layers, x) + mask
        return layers["second"](_CentredGradient.apply(layers["first"](x))) + mask

    x = values(4, 5).float()
    with pytest.raises(ValueError, match=rf"{where} of sample \d move"):
        made_private(Call(_two_layers(), masked), x)[1](x)


def test_a_sample_that_is_not_finite_and_stays_apart_is_no_obstacle() -> None:
    """Layers with several rows for each sample could otherwise not train before a finite batch."""
    x = values(4, 5).float()
    x[2, 0] = torch.nan
    net = Call(nn.Linear(1, 3), lambda layer, x: layer(x.reshape(-1, 1)).reshape(len(x), -1))
    _, model, _, _ = made_private(net, x, grad_scaler=torch.amp.GradScaler("cpu"))
    with pytest.warns(UserWarning, match="1 of 4 samples"):
        squared_loss(model, (x,)).backward()


def test_first_and_last_sample_alike_are_replaced_by_others() -> None:
    torch.manual_seed(0)
    x = values(4, 5).float()
    x[3] = x[0]
    _, model, _, _ = made_private(Call(_two_layers(), _centred), x)
    with pytest.raises(ValueError, match=r"sample \d move"):
        model(x)


def test_a_check_on_a_batch_that_is_all_alike_is_refused() -> None:
    x = values(4, 5).float()
    engine, model, _, _ = made_private(nn.Linear(5, 3), x)
    with pytest.raises(ValueError, match="two samples or more that differ"):
        engine.check_per_sample(model, nn.MSELoss(), (torch.ones(4, 5), torch.ones(4, 3)))


class Sorted(nn.Module):
    """Sequences by falling length, as for packing by hand: rows of a layer are not the batch's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding(11, 4), nn.Linear(4, 3)

    def forward(self, indices: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        order = lengths.argsort(descending=True, stable=True)
        return self.layer(self.embedding(indices)[order].tanh())[order.argsort()]


def test_three_samples_are_tried_after_two() -> None:
    """Once one of two has taken the other's place, their order cannot be told."""
    torch.manual_seed(0)
    _, model, _, _ = made_private(Sorted(), ids(3, 5))
    model(ids(2, 5), torch.tensor([4, 3]))
    with pytest.raises(ValueError, match=r"'layer': the activations of sample \d move"):
        model(ids(3, 5), torch.tensor([4, 3, 2]))


@pytest.mark.parametrize("error", [AssertionError, ValueError, KeyError, RuntimeError])
def test_a_model_that_wants_lengths_sorted_is_tried_with_its_lengths(
    error: type[Exception],
) -> None:
    """The last sample in the place of the first unsorts them; mixing is found all the same."""

    class WantsSorted(nn.Module):
        def __init__(self, mixes: bool) -> None:
            super().__init__()
            self.layer, self.mixes = nn.Linear(5, 3), mixes

        def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            if not torch.equal(lengths, lengths.sort(descending=True).values):
                raise error
            return self.layer(x - x.mean(0, keepdim=True) if self.mixes else x)

    torch.manual_seed(0)
    x, lengths = values(4, 5).float(), torch.tensor([4, 3, 2, 1])
    _, model, _, _ = made_private(WantsSorted(mixes=False), x)
    assert model(x, lengths).shape == (4, 3)
    _, model, _, _ = made_private(WantsSorted(mixes=True), x)
    with pytest.raises(ValueError, match=r"'layer': the activations of sample \d move"):
        model(x, lengths)


@pytest.mark.parametrize("draw", [random.random, np.random.rand])
def test_layers_skipped_by_other_generators(draw: Callable[[], float]) -> None:
    """The runs of a trial draw the same numbers, and leave every generator where it was."""

    def skipping(model: nn.ModuleDict, x: torch.Tensor) -> torch.Tensor:
        for _ in range(8):
            x = model["first"](x) if draw() < 0.5 else x
        return model["second"](x)

    x = values(4, 5).float()
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    expected = [draw() for _ in range(9)][8]
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    _, model, _, _ = made_private(Call(_two_layers(), skipping), x)
    squared_loss(model, (x,)).backward()
    assert draw() == expected


@pytest.mark.parametrize("samples", [64, 256])
def test_statistics_of_a_large_batch_in_half_precision(samples: int) -> None:
    """One sample of many moves the others by less than bfloat16 rounds."""
    torch.manual_seed(0)
    x = torch.randn(samples, 5)
    _, model, _, _ = made_private(Call(_two_layers(), _centred), x)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match="when samples .* are replaced"),
    ):
        model(x)


def test_layers_called_around_the_model_are_pointed_out() -> None:
    """No trial can be run there, and a thawed batch normalisation is refused there too."""
    x = values(4, 5).float()
    net = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5, affine=False), nn.Linear(5, 3))
    net[1].eval()
    _, model, _, _ = made_private(net, x)
    model(x)
    with pytest.warns(UserWarning, match="'0' was called outside the model's forward"):
        net[0](x)
    model.train()
    with pytest.raises(ValueError, match="'1'.*in training mode now"):
        net[0](x)


def test_a_first_tensor_that_is_not_the_batch_is_refused() -> None:
    """The height and width of square images are not two samples of half a batch each."""

    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, size: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) * size.prod()

    x = values(6, 5).float()
    _, model, _, _ = made_private(Sized(), x)
    output = model(torch.tensor([2.0, 2.0]), x)
    with pytest.raises(ValueError, match="'layer'.*pass the batch as the first tensor"):
        output.square().sum(1).mean().backward()


@pytest.mark.parametrize("number", [True, False])
def test_a_state_that_is_read_only_later_is_found_later(number: bool) -> None:
    """What is kept and not read is no fault until it is read, which a later trial sees."""

    class Centring(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 3)
            self.centre, self.calls = 0.0, 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.first(x)
            self.calls += 1
            output = self.second(hidden - self.centre if self.calls > 5 else hidden)
            self.centre = hidden.detach().mean().item() if number else hidden.detach().mean(0)
            return output

    torch.manual_seed(0)
    x = values(4, 5).float()
    model = made_private(Centring(), x)[1]
    for _ in range(7):
        model(x)
    with pytest.raises(ValueError, match="attribute 'centre': .* moves the next pass"):
        model(x)


def test_a_decision_on_which_each_half_agrees_is_found() -> None:
    """Many samples are above 1, so that no half of the batch changes what any() says."""

    def scaled(layers: nn.ModuleDict, x: torch.Tensor) -> torch.Tensor:
        return layers["second"](layers["first"](x) * (2.0 if bool((x > 1).any()) else 1.0))

    torch.manual_seed(0)
    x = torch.rand(16, 5)
    x[3:] += 1.5
    model = made_private(Call(_two_layers(), scaled), x, trial="every")[1]
    model(x)
    model(x)
    with pytest.raises(ValueError, match="'module.second': the activations of sample . move"):
        model(x)


class OwnDict(dict[str, torch.Tensor]):
    """No pytree."""


@pytest.mark.parametrize("wrap", [
    lambda output: SimpleNamespace(output=output),
    lambda output: UserDict(output=output),
    lambda output: OwnDict(output=output),
    lambda output: [SimpleNamespace(inner={"output": output})],
])  # fmt: skip
def test_outputs_in_objects_of_any_class_are_watched(wrap: Callable[[object], object]) -> None:
    torch.manual_seed(0)
    x = values(4, 5).float()
    mixing = Call(nn.Linear(5, 3), lambda layer, x: wrap(layer(x) - layer(x).mean(0)))
    with pytest.raises(ValueError, match=r"values of output 0 of sample \d move"):
        made_private(mixing, x)[1](x)
    made_private(Call(nn.Linear(5, 3), lambda layer, x: wrap(layer(x))), x)[1](x)


def test_arguments_in_objects_of_any_class_are_poisoned() -> None:
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, x: torch.Tensor, more: OwnDict) -> torch.Tensor:
            return self.layer(x * more["weight"].mean())

    torch.manual_seed(0)
    x, more = values(4, 5).float(), OwnDict(weight=torch.rand(4))
    kept = more["weight"].clone()
    model = made_private(Weighted(), x)[1]
    with pytest.raises(ValueError, match="'layer': the activations"):
        model(x, more)
    assert torch.equal(more["weight"], kept)


def test_sparse_outputs_are_no_obstacle() -> None:
    x = values(4, 5).float()
    net = Call(nn.Linear(5, 3), lambda layer, x: (layer(x), layer(x).detach().to_sparse()))
    _, model, optimizer, _ = made_private(net, x)
    squared_loss(model, (x,)).backward()
    optimizer.step()


def test_a_share_as_small_as_rounding_is_found_without_nan() -> None:
    """A thousand times a sample's values move the others by less than the tolerance."""

    def mixed(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return layer(x - 1e-8 * x.mean(0, keepdim=True).nan_to_num())

    torch.manual_seed(0)
    x = values(16, 5).float()
    with pytest.raises(ValueError, match=r"'module': the activations of sample \d+ move"):
        made_private(Call(nn.Linear(5, 3), mixed), x)[1](x)


@pytest.mark.parametrize("to", [0, 1])
def test_integers_are_tried_in_both_directions_at_once(to: int) -> None:
    """Every other sample takes something of its neighbour, and gives nothing back."""

    def neighbours(layers: nn.ModuleDict, x: torch.Tensor) -> torch.Tensor:
        hidden = layers["table"](x).mean(1)
        taken = torch.zeros_like(hidden)
        taken[to::2] = hidden[1 - to :: 2]
        return layers["head"](hidden + taken.detach())

    torch.manual_seed(0)
    net = nn.ModuleDict({"table": nn.Embedding(11, 4), "head": nn.Linear(4, 3)})
    with pytest.raises(ValueError, match=rf"'module.head': the activations of sample {to} move"):
        made_private(Call(net, neighbours), ids(8, 5), trial="first")[1](ids(8, 5))


class LanguageModel(nn.Module):
    """Returns its loss, a mean over the tokens that count."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 4), nn.Linear(4, 11)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.embedding(x))
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def test_a_mean_over_tokens_is_refused_before_the_first_padding_comes() -> None:
    torch.manual_seed(0)
    x = ids(8, 6)
    model = made_private(LanguageModel(), x, trial="first")[1]
    with pytest.raises(ValueError, match="The model's own loss couples samples"):
        model(x, x.roll(-1, 1)).backward()
