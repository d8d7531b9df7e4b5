"""``PrivacyEngine``: Opacus' surface over the fused engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from opacus import PrivacyEngine as OpacusPrivacyEngine
from opacus.accountants import create_accountant
from opacus.accountants.utils import get_noise_multiplier as opacus_noise_multiplier
from opacus.data_loader import switch_generator
from opacus.optimizers import DPOptimizer
from opacus.validators import ModuleValidator
from opacus.validators.errors import UnsupportedModuleError
from torch import nn, optim
from torch.utils.data import DataLoader

from dpkernels.accounting import get_noise_multiplier, opacus_adapter
from dpkernels.engine.arguments import (
    check_arguments,
    check_opacus_mode,
    check_same_parameters,
    faults_of,
    warn_of_lone_channels,
)
from dpkernels.engine.module import FusedGradSampleHooks, FusedGradSampleModule, make_module
from dpkernels.engine.plan.table import Plan
from dpkernels.engine.processes.collectives import Processes, processes_of
from dpkernels.engine.release.optimizer_kinds import optimizer_class
from dpkernels.engine.release.records import StepCounter
from dpkernels.engine.sampling import (
    check_shared,
    expected_batch_size_of,
    poisson_loader,
    refuse_random_rows,
    sample_rate_of,
    warn_of_another_dataset,
    warn_of_other_samplers,
)
from dpkernels.engine.trial.collate import refuse_mixing_collate
from dpkernels.engine.trial.criterion import check_criterion
from dpkernels.reconstruction import risk_report

opacus_adapter.register()

_FUSED = "fused"


class PrivacyEngine(OpacusPrivacyEngine):
    """Makes a training loop differentially private: the entry point.

    The surface is that of ``opacus.PrivacyEngine``; ``grad_sample_mode="fused"`` (the default)
    captures, clips, sums and adds noise inside one backward pass, and Opacus' own modes run as
    Opacus runs them.

    Args:
        accountant: ``"tight"`` (ours, an upper bound within 1 % of exact), ``"prv"``, ``"rdp"``,
            ``"gdp"``, or any that is registered with `dpkernels.accounting` or with Opacus.
        secure_mode: in mode "fused", noise that floating-point arithmetic cannot give away
            (docs/math.md, section 3), and batches drawn by the operating system's generator, which
            keys the noise in any case. Opacus' modes need ``torchcsprng`` for secure mode.

    Guarantees:
        In mode "fused" with Poisson sampling, each step releases the Poisson-subsampled Gaussian
        mechanism of the accountant's history (docs/math.md, sections 1 and 4).
    """

    def __init__(self, *, accountant: str = "tight", secure_mode: bool = False):
        opacus_adapter.register()
        self.accountant = create_accountant(mechanism=accountant)
        self.secure_mode = secure_mode
        self.secure_rng = None
        self.dataset: Any = None
        self._module: FusedGradSampleModule | FusedGradSampleHooks | None = None

    def is_compatible(
        self,
        *,
        module: nn.Module,
        optimizer: optim.Optimizer | None = None,
        data_loader: DataLoader | None = None,
    ) -> bool:
        """Whether the model has per-sample gradients under this engine."""
        return not faults_of(module)

    def validate(
        self,
        *,
        module: nn.Module,
        optimizer: optim.Optimizer | None = None,
        data_loader: DataLoader | None = None,
    ) -> None:
        """Raise ``UnsupportedModuleError`` naming every module that mixes samples."""
        faults = faults_of(module)
        if faults:
            raise UnsupportedModuleError(faults)

    @classmethod
    def get_compatible_module(
        cls, module: nn.Module, *, num_groups: int | None = None
    ) -> nn.Module:
        """A copy of the model with batch normalisations replaced by ``nn.GroupNorm``.

        Args:
            module: the model; a module for which Opacus has no replacement stays as it is.
            num_groups: of every new GroupNorm, a divisor of its channels; None takes Opacus'
                gcd(32, channels), and warns where each group then has a single channel.

        Raises:
            UnsupportedModuleError: a module mixes samples and has no replacement.
        """
        stated = {} if num_groups is None else {"num_groups": num_groups}
        fixed = ModuleValidator.fix(module, **stated)
        if num_groups is None:
            warn_of_lone_channels(module, fixed)
        ModuleValidator.validate(fixed, strict=True)
        return fixed

    def make_private(
        self,
        *,
        module: nn.Module,
        optimizer: optim.Optimizer,
        criterion: nn.Module | None = None,
        data_loader: DataLoader,
        noise_multiplier: float,
        max_grad_norm: float | list[float],
        batch_first: bool = True,
        loss_reduction: str = "mean",
        poisson_sampling: bool = True,
        clipping: str = "flat",
        noise_generator: torch.Generator | None = None,
        grad_sample_mode: str = _FUSED,
        wrap_model: bool = True,
        rand_on_empty: bool = False,
        memory_budget: int | None = None,
        plan: str = "auto",
        views_per_sample: int = 1,
        materialize_grad_samples: bool = False,
        grad_scaler: torch.amp.GradScaler | None = None,
        trial: str = "doubling",
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """Private counterparts of model, optimizer and data loader.

        Arguments and results are those of ``opacus.PrivacyEngine.make_private``, and some more.

        Args:
            module: the model, in training mode; also in DDP or under ``fully_shard``.
            optimizer: over parameters of `module`.
            criterion: for Opacus' ghost modes; "fused" takes any loss, as the loop computes it.
            data_loader: its dataset, batch size and number of batches are kept; under Poisson
                sampling, batches have that size on average.
            noise_multiplier: std of the noise divided by `max_grad_norm`.
            max_grad_norm: bound C on the norm of each sample's gradient; a list, one for each
                trained parameter, with ``clipping="per_layer"``.
            batch_first: whether the first axis of the model's inputs is the sample axis; False if
                the second axis is.
            loss_reduction: ``"mean"`` or ``"sum"``, as the loss reduces over the batch.
            poisson_sampling: draw batches as accounted; False keeps the loader, and voids epsilon.
            clipping: ``"flat"``, ``"automatic"``, ``"per_layer"`` or ``"adaptive"`` (docs/math.md,
                section 1; the settings of "adaptive" are further keyword arguments, as in Opacus).
            noise_generator: draws the noise, repeatably; None draws from ChaCha20 keyed by the
                operating system.
            grad_sample_mode: ``"fused"``, or one of Opacus': ``"hooks"``, ``"functorch"``,
                ``"ew"``, ``"ghost"``, ``"ghost_fsdp"``, ``"no_op"``.
            wrap_model: False leaves the model itself as it is and returns the holder of the hooks.
            rand_on_empty: for Opacus' modes; refused in mode "fused": an empty batch has no row.
            memory_budget: bytes for stored per-sample gradients; None: a quarter of what is free.
            plan: ``"auto"`` counts operations and bytes, ``"measured"`` times every strategy on the
                first step's operands.
            views_per_sample: rows of the model's input that belong to one sample (adjacent);
                their gradients are averaged before clipping.
            materialize_grad_samples: also leave ``p.grad_sample`` after ``backward()``.
            grad_scaler: the scaler of the loss in fp16 training; its scale stays fixed.
            trial: when batches are tried for samples that mix: ``"doubling"`` (the first and the
                2nd, 4th, 8th, ...), ``"first"``, ``"every"`` or ``"off"`` (docs/pitfalls.md).

        Returns:
            ``(module, optimizer, data_loader)`` in mode "fused".

        Raises:
            ValueError: arguments out of range, foreign parameters, or a mixing ``collate_fn``.
            UnsupportedModuleError: a module mixes samples.
        """
        shared = {
            "noise_multiplier": noise_multiplier,
            "max_grad_norm": max_grad_norm,
            "loss_reduction": loss_reduction,
            "clipping": clipping,
            **kwargs,
        }
        if grad_sample_mode != _FUSED:
            check_opacus_mode(
                grad_sample_mode,
                views_per_sample=views_per_sample != 1,
                memory_budget=memory_budget is not None,
                plan=plan != "auto",
                grad_scaler=grad_scaler is not None,
                trial=trial != "doubling",
            )
            return self._make_private_by_opacus(
                module=module,
                optimizer=optimizer,
                criterion=criterion,
                data_loader=data_loader,
                batch_first=batch_first,
                poisson_sampling=poisson_sampling,
                noise_generator=noise_generator,
                grad_sample_mode=grad_sample_mode,
                wrap_model=wrap_model,
                rand_on_empty=rand_on_empty,
                **shared,
            )
        check_arguments(noise_multiplier, max_grad_norm, views_per_sample, trial)
        check_same_parameters(module, optimizer)
        refuse_random_rows(data_loader, rand_on_empty)
        if trial != "off":
            refuse_mixing_collate(data_loader, batch_first)
        processes = processes_of(module)
        check_shared(data_loader, processes, poisson_sampling)
        processes.adopt(module)
        self.validate(module=module)
        private_module = make_module(
            module,
            batch_first=batch_first,
            loss_reduction=loss_reduction,
            wrap_model=wrap_model,
            views_per_sample=views_per_sample,
            memory_budget=memory_budget,
            plan=plan,
            trial=trial,
        )
        if poisson_sampling:
            private_module.forbid_grad_accumulation()
        sample_rate = sample_rate_of(data_loader)
        private_loader = self._prepare_data_loader(
            data_loader,
            poisson_sampling=poisson_sampling,
            processes=processes,
            batch_first=batch_first,
            rand_on_empty=rand_on_empty,
        )
        private_optimizer = optimizer_class(clipping, processes)(
            optimizer.original_optimizer if isinstance(optimizer, DPOptimizer) else optimizer,
            expected_batch_size=expected_batch_size_of(data_loader, processes.world_size),
            generator=noise_generator,
            views_per_sample=views_per_sample,
            materialize_grad_samples=materialize_grad_samples,
            processes=processes,
            secure_mode=self.secure_mode,
            **shared,
        )
        private_optimizer.attach_grad_scaler(grad_scaler)
        private_optimizer.attach_step_hook(StepCounter(self.accountant, sample_rate))
        private_module.connect(private_optimizer)
        self._module = private_module
        return private_module, private_optimizer, private_loader

    def _make_private_by_opacus(
        self, *, criterion: nn.Module | None, **arguments: Any
    ) -> tuple[Any, ...]:
        """``make_private`` in one of Opacus' own modes, as Opacus runs them."""
        if self.secure_mode:
            self.secure_rng = OpacusPrivacyEngine(secure_mode=True).secure_rng
        criterion = nn.CrossEntropyLoss() if criterion is None else criterion
        return super().make_private(criterion=criterion, **arguments)

    def make_private_with_epsilon(
        self,
        *,
        module: nn.Module,
        optimizer: optim.Optimizer,
        criterion: nn.Module | None = None,
        data_loader: DataLoader,
        target_epsilon: float,
        target_delta: float,
        epochs: int,
        max_grad_norm: float | list[float],
        grad_sample_mode: str = _FUSED,
        epsilon_tolerance: float = 0.01,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """:meth:`make_private` with the noise that spends `target_epsilon` over `epochs`.

        Args:
            target_epsilon: the budget at the end of training.
            target_delta: the budget's delta.
            epochs: passes over the data loader; steps = epochs * len(data_loader).
            epsilon_tolerance: how far below the target Opacus' accountants may stop; ignored by
                ours.
        """
        mechanism = self.accountant.mechanism()
        ours = opacus_adapter.has(mechanism)
        if ours or grad_sample_mode == _FUSED:
            rate, steps = sample_rate_of(data_loader), int(epochs * len(data_loader))
        else:
            rate = 1 / len(data_loader)
            steps = int(epochs / rate)
        tolerant = partial(opacus_noise_multiplier, epsilon_tolerance=epsilon_tolerance)
        calibrate = get_noise_multiplier if ours else tolerant
        return self.make_private(
            module=module,
            optimizer=optimizer,
            criterion=criterion,
            data_loader=data_loader,
            noise_multiplier=calibrate(
                target_epsilon=target_epsilon,
                target_delta=target_delta,
                sample_rate=rate,
                steps=steps,
                accountant=mechanism,
            ),
            max_grad_norm=max_grad_norm,
            grad_sample_mode=grad_sample_mode,
            **kwargs,
        )

    def explain(self) -> Plan:
        """Which strategy each parameter got, its cost and why: printable, ``.rows`` as dicts."""
        if self._module is None:
            raise ValueError("explain(): call make_private(grad_sample_mode='fused') first")
        return Plan(self._module.planner)

    def risk_report(self, *, delta: float, dataset_size: int | None = None, **kwargs: Any) -> Any:
        """What an attacker could and could not reconstruct after the steps taken so far.

        Args:
            delta: in (0, 1).
            dataset_size: number of training records; None takes those of the loader made private.
            **kwargs: further arguments of :func:`dpkernels.reconstruction.risk_report`
                (`dimension`, `data_norm`, `data_range`, `kappa`).

        Returns:
            A ``RiskReport``: ``.rows``, ``.to_markdown()``, ``.to_json()``, ``.plot(path)``.

        Raises:
            ValueError: no step was taken, or an argument is out of range.
        """
        if not self.accountant.history:
            raise ValueError("risk_report(): no step has been taken, so there is nothing to report")
        if dataset_size is None and self.dataset is None:
            raise ValueError("dataset_size=None: expected the number of training records")
        dataset_size = len(self.dataset) if dataset_size is None else dataset_size
        return risk_report(
            history=self.accountant.history, delta=delta, dataset_size=dataset_size, **kwargs
        )

    def check_per_sample(
        self, model: nn.Module, criterion: Callable[..., torch.Tensor], batch: Sequence[Any]
    ) -> None:
        """Check on one batch that neither the model nor the criterion mixes samples.

        One sample is replaced by another: activations and gradients of all others must not move.

        Args:
            model: the private model, or an ordinary model.
            criterion: called as ``criterion(model(*inputs), target)``.
            batch: ``(*inputs, target)`` with at least two samples that differ.

        Raises:
            ValueError: samples mix; the message names the layer or the criterion.
        """
        if isinstance(model, (FusedGradSampleModule, FusedGradSampleHooks)):
            check_criterion(model, model.session, criterion, batch)
            return
        self.validate(module=model)
        hooks = FusedGradSampleHooks(model)
        try:
            check_criterion(model, hooks.session, criterion, batch)
        finally:
            hooks.cleanup()

    def _prepare_data_loader(
        self,
        data_loader: DataLoader,
        *,
        poisson_sampling: bool,
        distributed: bool = False,
        processes: Processes | None = None,
        **kwargs: Any,
    ) -> DataLoader:
        self.dataset = data_loader.dataset if self.dataset is None else self.dataset
        warn_of_another_dataset(self.dataset, data_loader.dataset)
        if not poisson_sampling:
            warn_of_other_samplers(data_loader)
            if self.secure_rng is None:
                return data_loader
            return switch_generator(data_loader=data_loader, generator=self.secure_rng)
        return poisson_loader(
            data_loader,
            processes,
            secure=self.secure_mode and self.secure_rng is None,
            generator=self.secure_rng,
            distributed=distributed,
            **kwargs,
        )
