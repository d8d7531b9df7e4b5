"""Who is measured: each rival turns a workload into a training step, as its documentation says.

After ``step()`` the gradient that the optimizer used is in ``p.grad``; with noise off it must be
that of the per-sample loop, or the rival is not timed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import opacus
import torch
from opacus.validators import ModuleValidator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dpkernels
from bench import adapt, results, table
from bench.cases import SampleCrossEntropy, Workload

_LEARNING_RATE = 1e-4


@dataclass
class Privacy:
    """What a private rival is asked for: flat clipping at C, noise of std sigma * C.

    The noise may be changed between steps: the gate's step has none.
    """

    max_grad_norm: float
    noise_multiplier: float


@dataclass(frozen=True)
class Trainer:
    """A prepared rival.

    Attributes:
        step: forward, backward and ``optimizer.step()`` on the workload's batch.
        clear: ``optimizer.zero_grad()``, which also frees what the rival keeps per sample.
        parameters: by their names in the workload's network.
        margin: how far the last step's clip factors lie, on purpose, below ``min(1, C / norm)``,
            relative to it: what a rival leaves for rounding.
    """

    step: Callable[[], None]
    clear: Callable[[], None]
    parameters: dict[str, nn.Parameter]
    margin: Callable[[], float] = float

    def __call__(self) -> None:
        """What is timed: one step, cleared."""
        self.step()
        self.clear()


@dataclass(frozen=True)
class Rival:
    """One way of training.

    Attributes:
        name: key of its rows.
        title: for tables.
        config: how it is set up, as its documentation advises; part of each row.
        package: distribution whose version the row states.
        prepare: (workload, privacy) -> Trainer.
        private: False for the ordinary step only.
    """

    name: str
    title: str
    config: str
    package: str
    prepare: Callable[[Workload, Privacy], Trainer]
    private: bool = True

    def version(self) -> str:
        """Version of its package; empty where that is not installed."""
        fallback = dpkernels.__version__ if self.package == "dpkernels" else ""
        return results.version_of(self.package) or fallback


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=_LEARNING_RATE)


def _clearing(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    return partial(optimizer.zero_grad, set_to_none=True)


def _ordinary(workload: Workload, privacy: Privacy) -> Trainer:
    model = workload.fresh_model()
    optimizer, criterion = _sgd(model), SampleCrossEntropy()

    def step() -> None:
        workload.loss(model, criterion).backward()
        optimizer.step()

    return Trainer(step, _clearing(optimizer), dict(model.named_parameters()))


def _with_engine(
    engine: Any,
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    workload: Workload,
    privacy: Privacy,
    **options: Any,
) -> Trainer:
    """The loop that Opacus documents; every argument it does not name is at its default."""
    data = DataLoader(
        TensorDataset(workload.inputs, workload.target), batch_size=workload.batch_size
    )
    module, optimizer, *rest = engine.make_private(
        module=model,
        optimizer=_sgd(model),
        criterion=SampleCrossEntropy(),
        data_loader=data,
        noise_multiplier=privacy.noise_multiplier,
        max_grad_norm=privacy.max_grad_norm,
        poisson_sampling=False,
        **options,
    )
    criterion = rest[0] if len(rest) == 2 else SampleCrossEntropy()

    def step() -> None:
        optimizer.noise_multiplier = privacy.noise_multiplier
        workload.loss(module, criterion).backward()
        optimizer.step()

    def margin() -> float:
        report = getattr(optimizer, "last_step", None)
        if report is None:
            return 0.0
        exact = (privacy.max_grad_norm / report.per_sample_norm).clamp(max=1.0)
        return float((1.0 - report.clip_factor / exact).max())

    return Trainer(step, _clearing(optimizer), parameters, margin)


def ours(
    workload: Workload,
    privacy: Privacy,
    engine: dpkernels.PrivacyEngine | None = None,
    **options: Any,
) -> Trainer:
    """Ours, by a new engine or by the one given; `options` are further ones of make_private."""
    engine, model = engine or dpkernels.PrivacyEngine(), workload.fresh_model()
    parameters = dict(model.named_parameters())
    return _with_engine(engine, model, parameters, workload, privacy, **options)


def _opacus(mode: str, workload: Workload, privacy: Privacy) -> Trainer:
    engine = opacus.PrivacyEngine(accountant="rdp")
    model = ModuleValidator.fix(workload.fresh_model())
    if mode == "ew":
        model = adapt.without_bare_parameters(model)
    parameters = dict(model.named_parameters())
    model = adapt.hookable(model)
    return _with_engine(engine, model, parameters, workload, privacy, grad_sample_mode=mode)


def _loop(workload: Workload, privacy: Privacy) -> Trainer:
    model = workload.fresh_model()
    optimizer, criterion = _sgd(model), SampleCrossEntropy()
    parameters = list(model.parameters())
    samples = workload.samples()

    def step() -> None:
        total: list[torch.Tensor] = []
        for sample in samples:
            optimizer.zero_grad()
            sample.loss(model, criterion).backward()
            grads = [p.grad for p in parameters]
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
            factor = (privacy.max_grad_norm / norm).clamp(max=1.0)
            torch._foreach_mul_(grads, factor)
            if total:
                torch._foreach_add_(total, grads)
            else:
                total = grads
        std = privacy.noise_multiplier * privacy.max_grad_norm
        if std:
            torch._foreach_add_(total, [torch.randn_like(t) for t in total], alpha=std)
        torch._foreach_div_(total, float(workload.batch_size))
        for parameter, gradient in zip(parameters, total, strict=True):
            parameter.grad = gradient
        optimizer.step()

    return Trainer(step, _clearing(optimizer), dict(model.named_parameters()))


def _backpack(workload: Workload, privacy: Privacy) -> Trainer:
    if importlib.util.find_spec("backpack") is None:
        raise ImportError("backpack-for-pytorch is not installed")
    from backpack import backpack, extend
    from backpack.extensions import BatchGrad

    model = adapt.without_bare_parameters(workload.fresh_model())
    parameters = dict(model.named_parameters())
    model = adapt.hookable(model)
    optimizer, criterion = _sgd(model), SampleCrossEntropy()
    extend(model)

    def step() -> None:
        loss = workload.loss(model, criterion)
        with backpack(BatchGrad()):
            loss.backward()
        each = [_grad_batch(model, p).mul_(workload.batch_size) for p in parameters.values()]
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in each]).norm(dim=0)
        factor = (privacy.max_grad_norm / norms).clamp(max=1.0)
        std = privacy.noise_multiplier * privacy.max_grad_norm
        for parameter, gradient in zip(parameters.values(), each, strict=True):
            total = torch.einsum("b,b...->...", factor, gradient)
            if std:
                total = total.add_(torch.randn_like(total), alpha=std)
            parameter.grad = total / workload.batch_size
        optimizer.step()

    def clear() -> None:
        optimizer.zero_grad()
        for parameter in parameters.values():
            del parameter.grad_batch

    return Trainer(step, clear, parameters)


def _grad_batch(model: nn.Module, parameter: nn.Parameter) -> torch.Tensor:
    """[B, *parameter.shape]: what BackPACK left, where it has a rule for the layer."""
    if hasattr(parameter, "grad_batch"):
        return parameter.grad_batch
    owner = next(m for m in model.modules() if any(p is parameter for p in m._parameters.values()))
    raise NotImplementedError(f"BatchGrad has no rule for {type(owner).__name__}")


_HOOKABLE = "network as hooks need it (bench/adapt.py: nothing in place, one name a module)"
_OPACUS = (
    f"ModuleValidator.fix (DPLSTM for an LSTM), {_HOOKABLE}, PrivacyEngine.make_private defaults, "
    "flat clipping, fixed batch, whole batch at once; "
)

RIVALS = (
    Rival(
        "ordinary",
        "ordinary PyTorch",
        "SGD, whole batch; no privacy",
        "torch",
        _ordinary,
        private=False,
    ),
    Rival(
        "ours",
        "dpkernels",
        "PrivacyEngine.make_private defaults (mode fused, noise from ChaCha20), fixed batch",
        "dpkernels",
        ours,
    ),
    Rival(
        "loop",
        "per-sample loop",
        "physical batch 1, foreach norm, scale and sum, one noise draw",
        "torch",
        _loop,
    ),
    *(
        Rival(mode, f"Opacus {mode}", _OPACUS + config, "opacus", partial(_opacus, mode))
        for mode, config in {
            "hooks": "expand hooks where Opacus has a rule, functorch elsewhere",
            "ghost": "criterion returns one value per sample; two backward passes",
            "functorch": "vmap of grad",
            "ew": "torch ExpandedWeights; positions from nn.Embedding, not a bare parameter",
        }.items()
    ),
    Rival(
        "backpack",
        "BackPACK",
        f"{_HOOKABLE}, positions from nn.Embedding; BatchGrad in one backward pass, clip and noise "
        "as in its DP-SGD example",
        "backpack-for-pytorch",
        _backpack,
    ),
)


TITLES = {rival.name: rival.title for rival in RIVALS}
PRIVATE = [rival for rival in RIVALS if rival.private]


def find(names: list[str]) -> list[Rival]:
    """The rivals of these names, ordinary first since ratios need it; all where none is named.

    Raises:
        ValueError: a name that no rival has.
    """
    table.require_known("rival", names, TITLES)
    wanted = {*names, "ordinary"} if names else TITLES
    return [rival for rival in RIVALS if rival.name in wanted]
