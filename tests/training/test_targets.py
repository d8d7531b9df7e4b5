"""`_target_` blocks: what cannot be built is refused by the name of its setting."""

import pytest
import torch
from torch import nn

from dpkernels.training.targets import (
    build_model,
    build_optimizer,
    instantiate,
    resolve_device,
    select_trainable,
)

LINEAR = {"_target_": "torch.nn.Linear", "in_features": 3}


def test_a_block_becomes_its_object():
    built = instantiate({**LINEAR, "out_features": "$1 + 1"}, "network")
    assert isinstance(built, nn.Linear)
    assert built.out_features == 2


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"_target_": "torch.nn.Lineer"}, "x: .*torch.nn.Lineer"),
        ({**LINEAR, "features": 2}, "x: cannot build 'torch.nn.Linear' from .*features"),
        ({"_target_": "nowhere.Linear"}, "x: .*nowhere.Linear"),
    ],
)
def test_what_cannot_be_built_is_named(block, message):
    with pytest.raises(ValueError, match=message):
        instantiate(block, "x")


def test_initialisation_follows_the_seed_and_nothing_else():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    built = [build_model(LINEAR, {"out_features": 2}, "the data", seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(built[0].weight, built[1].weight)
    assert not torch.equal(built[0].weight, built[2].weight)


def test_channels_are_those_of_the_data():
    network = build_model(LINEAR, {"in_features": 3, "out_features": 2}, "the data", 0)
    assert network.out_features == 2
    with pytest.raises(ValueError, match="network.in_features must be 4, as the data says; got 3"):
        build_model(LINEAR, {"in_features": 4, "out_features": 2}, "the data", 0)
    with pytest.raises(ValueError, match="network: fractions.Fraction is not a torch.nn.Module"):
        build_model({"_target_": "fractions.Fraction"}, {}, "the data", 0)


def test_an_optimizer_has_the_given_parameters():
    parameters = list(nn.Linear(3, 2).parameters())
    optimizer = build_optimizer({"_target_": "torch.optim.NAdam", "lr": 0.5}, parameters)
    assert isinstance(optimizer, torch.optim.NAdam)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.param_groups[0]["params"] == parameters


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"_target_": "torch.optim.SGD", "lr": -1.0}, "training.optimizer: .* is refused: .*-1.0"),
        ({"_target_": "torch.optim.SGD", "rate": 1.0}, "training.optimizer: .* is refused: .*rate"),
        ({"_target_": "torch.nn.ParameterList"}, "ParameterList is not a torch optimizer"),
        ({"_target_": "torch.optim.Sgd"}, "training.optimizer: .*torch.optim.Sgd"),
    ],
)
def test_what_is_no_optimizer_is_refused(block, message):
    with pytest.raises(ValueError, match=message):
        build_optimizer(block, list(nn.Linear(3, 2).parameters()))


def test_chosen_layers_train_and_others_do_not():
    up = nn.Sequential(nn.Sequential(nn.Conv3d(2, 2, 1), nn.GroupNorm(1, 2)), nn.Conv3d(2, 2, 1))
    network = nn.ModuleDict({"up": up, "head": nn.Conv3d(2, 2, 1)})
    select_trainable(network, ["head.*", "up.0.?.weight"])
    trained = {n for n, p in network.named_parameters() if p.requires_grad}
    assert {"head.weight", "head.bias"} < trained
    assert all(n.startswith(("head", "up.0")) for n in trained)
    select_trainable(network, [])
    assert all(p.requires_grad for p in network.parameters())


def test_a_pattern_that_matches_nothing_is_named():
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"'head\.\*' matches no parameter; names are like 0.wei"):
        select_trainable(network, ["0.*", "head.*"])


def test_devices_are_found_or_refused():
    assert resolve_device("cpu") == torch.device("cpu")
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert resolve_device("auto").type == expected
    for name in ("tpu", "cuda:99"):
        with pytest.raises(ValueError, match=f"training.device must be .*{name!r} failed"):
            resolve_device(name)
