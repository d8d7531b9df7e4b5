"""Network, optimizer and other `_target_` blocks, built by MONAI's ConfigParser; the device."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.networks.utils import eval_mode
from torch import nn

from dpkernels.training.run_folder import load_checkpoint

#: evaluation mode and no gradients in the block, the previous mode after it
evaluating = eval_mode


def instantiate(block: dict[str, Any], name: str) -> Any:
    """Build the object that a `_target_` block describes.

    Raises:
        ValueError: the target cannot be imported or refuses its arguments.
    """
    try:
        built = ConfigParser({name: dict(block)}).get_parsed_content(name)
    except Exception as error:
        cause = error.__cause__ or error
        raise ValueError(
            f"{name}: cannot build {block.get('_target_')!r} from {block}: {cause}"
        ) from error
    if isinstance(built, dict):
        raise ValueError(f"{name}: `_target_` {block.get('_target_')!r} names nothing importable")
    return built


def build_model(
    block: dict[str, Any], channels: Mapping[str, int], source: str, seed: int
) -> nn.Module:
    """Build the network; channel counts come from the data unless the block states them.

    Args:
        block: `_target_` and keyword arguments.
        channels: the counts by argument name.
        source: where they come from, for the error.
        seed: of the initialisation; the global generator is left as it was.

    Raises:
        ValueError: the block cannot be built, or its channel counts are not the data's.
    """
    for key, value in channels.items():
        if block.get(key, value) != value:
            raise ValueError(f"network.{key} must be {value}, as {source} says; got {block[key]}")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = instantiate({**block, **channels}, "network")
    if not isinstance(network, nn.Module):
        raise ValueError(f"network: {block['_target_']} is not a torch.nn.Module")
    return network


def load_weights(network: nn.Module, path: str) -> None:
    """Start from the weights of a checkpoint.

    Raises:
        ValueError: no checkpoint, or one of another network.
    """
    state = load_checkpoint(path)
    try:
        network.load_state_dict(state["model"])
    except RuntimeError as error:
        raise ValueError(f"training.init_from: {path} is of another network: {error}") from None


def build_optimizer(
    block: dict[str, Any], parameters: Sequence[nn.Parameter]
) -> torch.optim.Optimizer:
    """Build the optimizer over the trainable parameters.

    Raises:
        ValueError: the block cannot be built or is not an optimizer.
    """
    make = instantiate({**block, "_mode_": "callable"}, "training.optimizer")
    try:
        optimizer = make(list(parameters))
    except (TypeError, ValueError) as error:
        raise ValueError(f"training.optimizer: {block} is refused: {error}") from None
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"training.optimizer: {block['_target_']} is not a torch optimizer")
    return optimizer


def select_trainable(network: nn.Module, patterns: Sequence[str]) -> None:
    """Freeze every parameter whose name matches none of the glob patterns; no patterns: none.

    Raises:
        ValueError: a pattern matches no parameter.
    """
    names = [name for name, _ in network.named_parameters()]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(
                f"training.train_layers: {pattern!r} matches no parameter; names are like "
                f"{names[0]} ... {names[-1]}"
            )
    for name, parameter in network.named_parameters():
        chosen = not patterns or any(fnmatch.fnmatch(name, p) for p in patterns)
        parameter.requires_grad_(chosen)


def resolve_device(name: str) -> torch.device:
    """ "auto" is CUDA when there is one.

    Raises:
        ValueError: no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"training.device must be auto, cpu or cuda[:N]; {name!r} failed: {error}"
        ) from None
    return device
