"""The average of the weights against its closed form."""

import math

import pytest
import torch
from torch import nn

from dpkernels.training.ema import WeightAverage


def network_at(value: float) -> nn.Module:
    network = nn.Linear(2, 1)
    return set_to(network, value)


def set_to(network: nn.Module, value: float) -> nn.Module:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(value)
    return network


@pytest.mark.parametrize("decay", [0.1, 0.9, 0.9999])
def test_the_start_fades_as_the_product_of_the_decays(decay: float) -> None:
    """Weights jump from 0 to 1 at the first update: the average is 1 minus what is left of 0."""
    network = network_at(0.0)
    average = WeightAverage(network, decay)
    set_to(network, 1.0)
    decays = [min(decay, (1 + t) / (10 + t)) for t in range(1, 31)]
    for taken in range(30):
        average.update(network)
        left = math.prod(decays[: taken + 1])
        found = average.weights(network)["weight"]
        torch.testing.assert_close(found, torch.full((1, 2), 1 - left), rtol=1e-5, atol=1e-6)


def test_every_weight_counts_with_its_own_share() -> None:
    network = network_at(2.0)
    average = WeightAverage(network, 0.25)
    values, expected = (5.0, -1.0, 3.0), 2.0
    for t, value in enumerate(values, start=1):
        average.update(set_to(network, value))
        decay = min(0.25, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * value
    assert float(average.weights(network)["bias"]) == pytest.approx(expected)


def test_averaged_weights_hold_inside_the_block_only() -> None:
    network = network_at(0.0)
    average = WeightAverage(network, 0.5)
    average.update(set_to(network, 1.0))
    with average.applied_to(network):
        assert network.bias.item() == pytest.approx(1 - 2 / 11)
    assert network.bias.item() == 1.0
    with pytest.raises(KeyboardInterrupt), average.applied_to(network):
        raise KeyboardInterrupt
    assert network.bias.item() == 1.0


def test_without_a_decay_the_weights_are_the_networks() -> None:
    network = network_at(0.0)
    average = WeightAverage(network, 0.0)
    average.update(set_to(network, 1.0))
    assert not average.enabled
    assert float(average.weights(network)["bias"]) == 1.0


def test_a_restored_average_goes_on_as_if_it_had_not_stopped() -> None:
    network = network_at(0.0)
    whole, first = WeightAverage(network, 0.9), WeightAverage(network, 0.9)
    for value in (1.0, 4.0):
        for average in (whole, first):
            average.update(set_to(network, value))
    second = WeightAverage(network_at(-3.0), 0.9)
    second.load_state_dict(first.state_dict())
    for average in (whole, second):
        average.update(set_to(network, 2.0))
    assert torch.equal(second.weights(network)["weight"], whole.weights(network)["weight"])
