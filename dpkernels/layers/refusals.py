"""Modules that have no per-sample gradient as they stand: why, and what to use instead."""

from __future__ import annotations

from torch import nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


def refusal_without_rule(module: nn.Module) -> str | None:
    """Why no rule could train a module as it stands, with the remedy; None if a rule may."""
    instance = isinstance(module, nn.modules.instancenorm._InstanceNorm)
    batch = isinstance(module, nn.modules.batchnorm._NormBase) and not instance
    if batch and (module.training or module.running_mean is None):
        return (
            "normalises over the batch, so samples mix and no per-sample gradient exists; use "
            "nn.GroupNorm with a stated number of groups (PrivacyEngine.get_compatible_module("
            "model, num_groups=...)), or keep it in eval mode with its running statistics"
        )
    if instance and module.track_running_stats:
        return (
            "track_running_stats=True keeps statistics of private data outside the mechanism; "
            "use track_running_stats=False"
        )
    hooks = module._forward_pre_hooks.values()
    if any(isinstance(hook, WeightNorm) for hook in hooks):
        return (
            "torch.nn.utils.weight_norm computes the weight in a hook, outside the module's "
            "forward; use torch.nn.utils.parametrizations.weight_norm"
        )
    if isinstance(module, _SpectralNorm) or any(isinstance(hook, SpectralNorm) for hook in hooks):
        return (
            "spectral norm changes its power iteration between samples, so their gradients belong "
            "to different weights; use torch.nn.utils.parametrizations.weight_norm, or freeze the "
            "layer"
        )
    return None
