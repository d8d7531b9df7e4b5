"""Modules that have no per-sample gradient as they stand: why, and what to use instead."""

from __future__ import annotations

from torch import nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

_SPECTRAL = (
    "spectral norm changes its power iteration between samples, so their gradients belong to "
    "different weights; use torch.nn.utils.parametrizations.weight_norm, or freeze the layer"
)


def batch_norm_refusal(module: nn.Module) -> str | None:
    """Why a batch normalisation mixes samples; None in eval mode, with fixed statistics."""
    instance = isinstance(module, nn.modules.instancenorm._InstanceNorm)
    if instance or not isinstance(module, nn.modules.batchnorm._NormBase):
        return None
    if module.training or module.running_mean is None:
        return (
            "normalises over the batch, so samples mix and no per-sample gradient exists; use "
            "nn.GroupNorm with a stated number of groups (PrivacyEngine.get_compatible_module("
            "model, num_groups=...)), or keep it in eval mode with its running statistics"
        )
    return None


def running_statistics_refusal(module: nn.Module) -> str | None:
    """Why an instance normalisation with running statistics cannot be trained."""
    instance = isinstance(module, nn.modules.instancenorm._InstanceNorm)
    if instance and module.track_running_stats:
        return (
            "track_running_stats=True keeps statistics of private data outside the mechanism; "
            "use track_running_stats=False"
        )
    return None


def reparametrization_refusal(module: nn.Module) -> str | None:
    """Why a weight computed by a hook, or by a stateful parametrization, cannot be trained."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            return (
                "torch.nn.utils.weight_norm computes the weight in a hook, outside the module's "
                "forward; use torch.nn.utils.parametrizations.weight_norm"
            )
        if isinstance(hook, SpectralNorm):
            return _SPECTRAL
    if isinstance(module, _SpectralNorm):
        return _SPECTRAL
    return None
