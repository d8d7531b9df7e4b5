"""Checks of a model and of the arguments of ``make_private``."""

from __future__ import annotations

import warnings
from itertools import chain

from opacus.validators.errors import IllegalModuleConfigurationError
from torch import nn, optim

from dpkernels.engine.capture.trial_book import SCHEDULES
from dpkernels.layers import refusal

#: the modes of opacus.PrivacyEngine
_OPACUS_MODES = ("hooks", "functorch", "ew", "ghost", "ghost_fsdp", "no_op")


def faults_of(module: nn.Module) -> list[Exception]:
    """Every reason why a model has no per-sample gradients, as Opacus' validators report it."""
    faults: list[Exception] = []
    if not module.training:
        faults.append(
            IllegalModuleConfigurationError(
                "Model needs to be in training mode: call model.train() first"
            )
        )
    faults.extend(
        IllegalModuleConfigurationError(
            f"module {name or '(root)'!r} ({type(part).__name__}): {reason}"
        )
        for name, part in module.named_modules()
        if (reason := refusal(part)) is not None
    )
    faults.extend(
        IllegalModuleConfigurationError(
            f"parameter {name!r} is complex: clipping and noise are defined for real numbers; "
            "store real and imaginary parts (torch.view_as_real)"
        )
        for name, parameter in module.named_parameters()
        if parameter.is_complex()
    )
    return faults


def check_arguments(
    noise_multiplier: float,
    max_grad_norm: float | list[float],
    views_per_sample: int,
    trial: str,
) -> None:
    """Raise ``ValueError`` for a number that is out of range, or a schedule there is not."""
    if trial not in SCHEDULES:
        raise ValueError(f"trial={trial!r}: expected one of {', '.join(map(repr, SCHEDULES))}")
    if not noise_multiplier >= 0.0 or noise_multiplier == float("inf"):
        raise ValueError(f"noise_multiplier={noise_multiplier}: expected a finite number >= 0")
    norms = max_grad_norm if isinstance(max_grad_norm, (list, tuple)) else [max_grad_norm]
    if not all(norm > 0.0 for norm in norms):
        raise ValueError(f"max_grad_norm={max_grad_norm}: expected a number > 0")
    whole = not isinstance(views_per_sample, bool) and views_per_sample == int(views_per_sample)
    if not whole or views_per_sample < 1:
        raise ValueError(f"views_per_sample={views_per_sample}: expected an integer >= 1")


def check_opacus_mode(grad_sample_mode: str, **stated: bool) -> None:
    """Raise ``ValueError`` for a mode that Opacus lacks, or an argument that only "fused" takes.

    Args:
        grad_sample_mode: the mode.
        **stated: by argument that only mode "fused" takes, whether the caller stated a value.
    """
    if grad_sample_mode not in _OPACUS_MODES:
        raise ValueError(
            f"grad_sample_mode={grad_sample_mode!r}: expected 'fused' or one of Opacus' modes "
            f"({', '.join(_OPACUS_MODES)})"
        )
    for name, is_stated in stated.items():
        if is_stated:
            raise ValueError(f"{name}: only grad_sample_mode='fused' takes it")


def check_same_parameters(module: nn.Module, optimizer: optim.Optimizer) -> None:
    """Raise ``ValueError`` if the optimizer holds a parameter that is not the module's."""
    known = set(module.parameters())
    for p in chain.from_iterable(group["params"] for group in optimizer.param_groups):
        if p not in known:
            raise ValueError(
                "Module parameters are different than optimizer Parameters: the optimizer "
                f"holds a parameter of shape {tuple(p.shape)} that is not in the module. Build "
                "the optimizer from module.parameters() of the very module that is made private"
            )


def warn_of_lone_channels(before: nn.Module, after: nn.Module) -> None:
    """Name every batch normalisation that became a GroupNorm with one channel in each group.

    Such a GroupNorm is an instance normalisation: every channel loses its mean, and nothing is left
    of a map of one position. Opacus' rule gcd(32, channels) gives one where channels divides 32.
    """
    replaced = dict(before.named_modules())
    lone = [
        name
        for name, module in after.named_modules()
        if isinstance(module, nn.GroupNorm)
        and module.num_groups == module.num_channels
        and not isinstance(replaced.get(name), nn.GroupNorm)
    ]
    if lone:
        warnings.warn(
            f"get_compatible_module(num_groups=None): the GroupNorm at {', '.join(lone)} has one "
            "channel in each group, so it erases every channel's mean; state num_groups (8, say), "
            "a divisor of the numbers of channels",
            stacklevel=3,
        )
