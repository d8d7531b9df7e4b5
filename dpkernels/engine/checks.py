"""What a model and the arguments of ``make_private`` must satisfy."""

from __future__ import annotations

from opacus.validators.errors import IllegalModuleConfigurationError
from torch import nn

from dpkernels.engine.module import incompatibilities


def faults_of(module: nn.Module) -> list[Exception]:
    """Every reason why a model has no per-sample gradients, as Opacus' validators report it."""
    faults: list[Exception] = []
    if not module.training:
        faults.append(
            IllegalModuleConfigurationError(
                "Model needs to be in training mode: call model.train() first"
            )
        )
    faults.extend(IllegalModuleConfigurationError(reason) for reason in incompatibilities(module))
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
    noise_multiplier: float, max_grad_norm: float | list[float], views_per_sample: int
) -> None:
    """Raise ``ValueError`` for a number that is out of range."""
    if not noise_multiplier >= 0.0 or noise_multiplier == float("inf"):
        raise ValueError(f"noise_multiplier={noise_multiplier}: expected a finite number >= 0")
    norms = max_grad_norm if isinstance(max_grad_norm, (list, tuple)) else [max_grad_norm]
    if not all(norm > 0.0 for norm in norms):
        raise ValueError(f"max_grad_norm={max_grad_norm}: expected a number > 0")
    whole = not isinstance(views_per_sample, bool) and views_per_sample == int(views_per_sample)
    if not whole or views_per_sample < 1:
        raise ValueError(f"views_per_sample={views_per_sample}: expected an integer >= 1")
