"""Proof that a layer is trained right: the engine against one sample at a time, in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from dpkernels.testing.truth import Batch, Loss
from dpkernels.testing.variations import NO_CLIPPING, VARIATIONS, Case, cast, is_float


def assert_per_sample(
    model: nn.Module,
    loss: Loss | nn.Module | None,
    batch: Batch,
    *,
    max_grad_norm: float | None = None,
    views_per_sample: int = 1,
    batch_first: bool = True,
    tolerance: float = 1e-9,
    variations: Iterable[str] | None = None,
) -> None:
    """Assert that the engine releases for `model` what one sample at a time gives.

    The truth takes each sample alone through plain autograd in float64, clips its gradient and
    averages. The engine takes the whole batch in mode "fused", noise off. The gradients of all
    parameters and the samples' norms must agree: for the batch as given, and in the variations of
    it that wrong rules tend to fail. Model, batch and random state stay as they are.

    Example:
        >>> assert_per_sample(Scale(5), None, (torch.randn(5, 3, 5),))
        >>> assert_per_sample(network, nn.CrossEntropyLoss(), (images, labels))
        >>> assert_per_sample(
        ...     network,
        ...     lambda model, batch: F.mse_loss(model(batch[0], batch[1]), batch[2]),
        ...     (images, ages, volumes),
        ... )

    Args:
        model: the layer, or a model with the layer in it. It must be in training mode, give the
            same in every pass (dropout off), and run in float64 and float32.
        loss: a function of model and batch that returns a scalar, the mean over samples; or a
            criterion of PyTorch's (an ``nn.Module``, a function of ``torch.nn.functional``), called
            as ``loss(model(*inputs), target)`` for a batch ``(*inputs, target)``; or None for a
            loss that depends on every value of ``model(*batch)`` (a scalar that a model returns is
            the loss itself). It must run on an empty batch too: Poisson sampling draws some.
        batch: tensors with the samples on their sample axis. Three samples or more show most.
        max_grad_norm: the bound C on a sample's gradient norm; None clips about half the samples.
        views_per_sample: number of adjacent rows that make up one sample.
        batch_first: whether the sample axis is the first; False if it is the second (tensors of one
            axis have the samples on that one).
        tolerance: largest error of a gradient, relative to its norm, in float64, whose rounding
            stays far below the default and that of a stray float32 far above.
        variations: names out of :data:`VARIATIONS`; None tries them all.

    Raises:
        AssertionError: a gradient or a norm is wrong, or the engine refuses the model or fails. The
            message states the variation, the parameter with the largest error, its error and norms.
        ValueError: an argument cannot be used; the message names it.
    """
    names = tuple(VARIATIONS if variations is None else variations)
    for fault in _faults(model, batch, views_per_sample, batch_first, names):
        raise ValueError(fault)
    for argument, value in (("max_grad_norm", max_grad_norm), ("tolerance", tolerance)):
        if value is not None and not value > 0:
            raise ValueError(f"{argument}={value}: expected a number > 0")
    given = Case(
        "as given",
        copy.deepcopy(model).double(),
        _function_of(loss, batch_first),
        cast(tuple(t.detach().clone() for t in batch), torch.float64),
        batch[0].shape[int(not batch_first)] // views_per_sample,
        max_grad_norm,
        views_per_sample,
        batch_first,
        tolerance,
    )
    devices = {p.get_device() for p in model.parameters() if p.is_cuda}
    with torch.random.fork_rng(sorted(devices)), torch.enable_grad():
        _check_loss(given, loss)
        replace(given, label="without clipping", max_grad_norm=NO_CLIPPING).check()
        given.check()
        for name in names:
            for case in VARIATIONS[name](given):
                case.check()


def _function_of(loss: Loss | nn.Module | None, batch_first: bool) -> Loss:
    """The loss as a function of model and batch."""
    if isinstance(loss, nn.Module) or getattr(loss, "__module__", "") == F.__name__:
        criterion: Any = copy.deepcopy(loss)

        def of_output(model: nn.Module, batch: Batch) -> torch.Tensor:
            if isinstance(criterion, nn.Module):
                criterion.to(next(model.parameters()).dtype)
            return criterion(model(*batch[:-1]), batch[-1])

        return of_output
    if loss is not None:
        return loss

    def every_value(model: nn.Module, batch: Batch) -> torch.Tensor:
        outputs = [t for t in tree_leaves(model(*batch)) if is_float(t)]
        if len(outputs) == 1 and outputs[0].ndim == 0:
            return outputs[0]
        rows = batch[0].shape[int(not batch_first)]
        return torch.stack([t.sin().sum() for t in outputs]).sum() / rows

    return every_value


def _faults(
    model: Any, batch: Any, views: int, batch_first: bool, names: tuple[str, ...]
) -> Iterator[str]:
    """What is wrong with the arguments of :func:`assert_per_sample`."""
    if not isinstance(model, nn.Module):
        yield f"model={model!r}: expected an nn.Module"
    if not model.training:
        yield "model: it is in eval mode, expected training mode: call model.train()"
    if not any(p.requires_grad for p in model.parameters()):
        yield "model: no parameter requires gradients, expected one or more"
    if not isinstance(batch, (tuple, list)) or not batch:
        yield f"batch: a {type(batch).__name__}, expected a tuple of tensors"
    if not all(isinstance(t, torch.Tensor) and t.ndim for t in batch):
        yield "batch: expected every entry to be a tensor with a sample axis"
    if views < 1:
        yield f"views_per_sample={views}: expected an integer >= 1"
    axis = int(not batch_first)
    rows = {t.shape[axis if t.ndim > axis else 0] for t in batch}
    if len(rows) > 1 or min(rows) < 1 or min(rows) % views:
        yield (
            f"batch: shapes {[tuple(t.shape) for t in batch]}, expected the same number of rows on "
            f"sample axis {axis} of each, a multiple of views_per_sample={views}"
        )
    if not set(names) <= set(VARIATIONS):
        yield f"variations={names!r}: expected names out of {', '.join(VARIATIONS)}"


def _check_loss(case: Case, loss: Any) -> None:
    """Raise ValueError where the loss cannot be used, or is another in every pass."""
    values = []
    for _ in range(2):
        model = copy.deepcopy(case.model)
        try:
            value = case.loss(model, tuple(t.clone() for t in case.batch))
        except (TypeError, AttributeError) as error:
            raise ValueError(
                f"loss={loss!r}: {error!r}; expected a function called as loss(model, batch), a "
                "criterion of PyTorch's, or None. For a function of output and target: "
                "lambda model, batch: criterion(model(batch[0]), batch[1])"
            ) from error
        if not isinstance(value, torch.Tensor) or value.ndim:
            shape = list(getattr(value, "shape", [])) or type(value).__name__
            raise ValueError(f"loss={loss!r}: it returned {shape}, expected a scalar tensor")
        values.append(value.item())
    if not math.isclose(*values, rel_tol=case.tolerance):
        raise ValueError(
            f"model: the loss of two passes over one batch is {values[0]:g} and {values[1]:g}, "
            "expected the same number; put dropout and other random layers into eval mode"
        )
    value.backward()
    if not any(p.grad is not None and bool(p.grad.any()) for p in model.parameters()):
        raise ValueError(f"loss={loss!r}: every gradient is zero, expected one that is not")
