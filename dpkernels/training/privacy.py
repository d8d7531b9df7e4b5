"""The privacy of a run: what is planned, and the update that keeps to it.

The trainer does not know which `Update` it holds, a `PrivateUpdate` or a `PlainUpdate`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel
from torch import nn
from torch.utils.data import DataLoader

from dpkernels import PrivacyEngine
from dpkernels.accounting import get_epsilon, get_noise_multiplier
from dpkernels.training.config import RunConfig
from dpkernels.training.processes import ALONE, TrainingProcesses
from dpkernels.training.sampling import flatten_views, patient_batches
from dpkernels.training.store import PatientDataset


@dataclass(frozen=True)
class PrivacyPlan:
    """Every number that the guarantee depends on. The unit is the patient, or what `unit` names.

    Attributes:
        enabled: False: no guarantee; the other fields describe the sampling only.
        patients: number of training patients N.
        sample_rate: probability q with which a patient enters a step's batch.
        steps: planned number of steps T.
        noise_multiplier: std of the noise divided by `max_grad_norm`.
        max_grad_norm: bound C on one patient's gradient.
        views_per_patient: rows averaged into one patient before clipping.
        delta: probability that the epsilon bound does not hold.
        accountant: name of the accountant that bounds epsilon.
        insecure_fixed_noise: seed of noise and sampling; None: the operating system's entropy.
        unit: what one "patient" is in these data: a patient, a lesion, an image.
    """

    enabled: bool
    patients: int
    sample_rate: float
    steps: int
    noise_multiplier: float
    max_grad_norm: float
    views_per_patient: int
    delta: float
    accountant: str
    insecure_fixed_noise: int | None = None
    unit: str = "patient"

    @property
    def expected_batch_size(self) -> float:
        """The fixed, public divisor q * N of every step; never the drawn size."""
        return self.sample_rate * self.patients

    def epsilon(self, steps: int | None = None, accountant: str | None = None) -> float | None:
        """Epsilon at `delta` after `steps` (default: all planned); None without privacy."""
        if not self.enabled:
            return None
        taken = self.steps if steps is None else steps
        if taken == 0:
            return 0.0
        return get_epsilon(
            noise_multiplier=self.noise_multiplier,
            sample_rate=self.sample_rate,
            steps=taken,
            delta=self.delta,
            accountant=accountant or self.accountant,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as stored with a checkpoint."""
        return asdict(self)

    def differences(self, stored: dict[str, Any]) -> list[str]:
        """Fields in which a stored plan differs, as sentences."""
        return [
            f"{name}: the run was started with {stored.get(name)!r}, now {value!r}"
            for name, value in self.to_dict().items()
            if stored.get(name) != value
        ]


def plan_privacy(config: RunConfig, patients: int, unit: str = "patient") -> PrivacyPlan:
    """Choose sample rate and noise for a number of training patients.

    The sample rate is batch_size / N.

    Raises:
        ValueError: more patients per batch than there are, or delta not below 1 / patients.
    """
    training, privacy = config.training, config.privacy
    if training.batch_size > patients:
        raise ValueError(
            f"training.batch_size must be at most the {patients} training {unit}s, got "
            f"{training.batch_size}; for example --set training.batch_size={max(1, patients // 4)}"
        )
    if privacy.enabled and privacy.delta >= 1 / patients:
        raise ValueError(
            f"privacy.delta must be below 1 / {patients} training {unit}s = {1 / patients:.2g}, "
            f"got {privacy.delta}"
        )
    sample_rate = training.batch_size / patients
    sigma = privacy.noise_multiplier or 0.0
    if privacy.enabled and privacy.epsilon is not None:
        sigma = get_noise_multiplier(
            target_epsilon=privacy.epsilon,
            target_delta=privacy.delta,
            sample_rate=sample_rate,
            steps=training.steps,
            accountant=privacy.accountant,
        )
    return PrivacyPlan(
        enabled=privacy.enabled,
        patients=patients,
        sample_rate=sample_rate,
        steps=training.steps,
        noise_multiplier=float(sigma) if privacy.enabled else 0.0,
        max_grad_norm=privacy.max_grad_norm,
        views_per_patient=config.data.views_per_patient,
        delta=privacy.delta,
        accountant=privacy.accountant,
        insecure_fixed_noise=privacy.insecure_fixed_noise,
        unit=unit,
    )


def check_patients_do_not_mix(
    network: nn.Module, criterion: nn.Module, dataset: PatientDataset, device: torch.device
) -> None:
    """Prove on two made-up rows that neither network nor loss lets one row see the other.

    Args:
        network: in training mode.
        criterion: called as criterion(output, label).
        dataset: gives the shape of a row and its label's dtype; its values are not used. Made-up
            labels are 0 and 1, another in each row, so that a loss that mixes them shows.
        device: of the network.

    Raises:
        ValueError: rows mix; the message names the layer or the criterion.
    """
    image, label = dataset[0]
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(2, *image.shape[1:], generator=generator)
    drawn = torch.randint(0, 2, label.shape[1:], generator=generator)
    labels = torch.stack([drawn, 1 - drawn]).to(label.dtype)
    batch = (rows.to(device), labels.to(device))
    PrivacyEngine().check_per_sample(network, criterion, batch)


@dataclass(frozen=True)
class StepStatistics:
    """What one step shows, under the names that metrics.csv has for it.

    Loss, norms and clipped share are NOT covered by the guarantee.

    Attributes:
        patients: drawn patients; 0 for an empty Poisson batch.
        loss: mean over the drawn patients; None for an empty batch.
        clipped_fraction: share of the drawn patients whose gradient was clipped; None when unknown.
        median_norm: median gradient norm over the drawn patients; None when unknown.
    """

    patients: int
    loss: float | None = None
    clipped_fraction: float | None = None
    median_norm: float | None = None


LossOfRows = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]


class Update(ABC):
    """Steps over Poisson batches of patients.

    Args:
        network: to train, in place.
        optimizer: of its trainable parameters.
        dataset: the training patients.
        plan: privacy of the run.
        physical_batch_size: patients per forward pass; 0: all.
        processes: those that take the steps together.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        dataset: PatientDataset,
        plan: PrivacyPlan,
        physical_batch_size: int,
        processes: TrainingProcesses = ALONE,
    ) -> None:
        self.plan = plan
        self.model: nn.Module = network
        self.optimizer: Any = optimizer
        self._physical = physical_batch_size
        self._batches = iter(self._prepare(dataset, processes))

    @abstractmethod
    def _prepare(self, dataset: PatientDataset, processes: TrainingProcesses) -> DataLoader:
        """Make model and optimizer ready; returns the loader of the batches."""

    @abstractmethod
    def step(self, loss_of_rows: LossOfRows) -> StepStatistics:
        """Draw a batch and take one step."""

    def _passes(self, image: torch.Tensor, label: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
        """Image and label [B, K, ...] of each forward pass."""
        size = self._physical or len(image)
        return list(zip(image.split(size), label.split(size), strict=True))


class PrivateUpdate(Update):
    """DP-SGD steps through the engine: Poisson batches, one clip per patient, noise once per step.

    Guarantees:
        Every step, also on an empty batch, adds noise of std noise_multiplier * max_grad_norm and
        is counted. Sampling and noise are drawn from the operating system's entropy, never from a
        seed of the run (except with `insecure_fixed_noise`, which voids the guarantee).
    """

    def _prepare(self, dataset: PatientDataset, processes: TrainingProcesses) -> DataLoader:
        plan, network = self.plan, self.model
        self._engine = PrivacyEngine(accountant=plan.accountant)
        several = processes.world_size > 1
        seed = plan.insecure_fixed_noise  # None: the engine's own noise, keyed by the system
        noise = None if seed is None else torch.Generator().manual_seed(seed)
        self.model, self.optimizer, loader = self._engine.make_private(
            module=DifferentiallyPrivateDistributedDataParallel(network) if several else network,
            optimizer=self.optimizer,
            data_loader=patient_batches(dataset, plan.sample_rate, seed, processes),
            noise_multiplier=plan.noise_multiplier,
            max_grad_norm=plan.max_grad_norm,
            poisson_sampling=False,  # the batches are Poisson already, from better entropy
            noise_generator=noise,
            views_per_sample=plan.views_per_patient,
        )
        return loader

    def step(self, loss_of_rows: LossOfRows) -> StepStatistics:
        """Draw a batch and take one step."""
        batch = next(self._batches)
        patients = len(batch[0])
        if not patients:
            self.optimizer.make_private_noise_only()
            self.optimizer.step()
            self.optimizer.zero_grad()
            return StepStatistics(0)
        total, norms, factors = 0.0, [], []
        passes = self._passes(*batch)
        for number, (image, label) in enumerate(passes, start=1):
            self.optimizer.signal_skip_step(do_skip=number < len(passes))
            loss = loss_of_rows(self.model, flatten_views(image), flatten_views(label))
            loss.backward()
            self.optimizer.step()
            norms.append(self.optimizer.last_step.per_sample_norm.detach().cpu())
            factors.append(self.optimizer.last_step.clip_factor.detach().cpu())
            self.optimizer.zero_grad()
            total += float(loss.detach()) * len(image)
        return StepStatistics(
            patients,
            total / patients,
            float((torch.cat(factors) < 1).float().mean()),
            float(torch.cat(norms).median()),
        )

    def count_lost_steps(self, steps: int) -> None:
        """Count steps that were taken after the last checkpoint and then lost."""
        for _ in range(steps):
            self._engine.accountant.step(
                noise_multiplier=self.plan.noise_multiplier, sample_rate=self.plan.sample_rate
            )

    @property
    def steps_counted(self) -> int:
        """Steps in the accountant's history."""
        return sum(int(entry[2]) for entry in self._engine.accountant.history)

    def state_dict(self) -> dict[str, Any]:
        """Optimizer and accountant; never the state of a noise generator."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "accountant": self._engine.accountant.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.optimizer.load_state_dict(state["optimizer"])
        self._engine.accountant.load_state_dict(state["accountant"])


class PlainUpdate(Update):
    """Ordinary steps over the same Poisson batches, without clipping, noise or any guarantee."""

    def _prepare(self, dataset: PatientDataset, processes: TrainingProcesses) -> DataLoader:
        if processes.world_size > 1:
            raise ValueError(
                f"--non-private: {processes.world_size} processes train together, which only a "
                "private run does; start it without torchrun"
            )
        self.steps_counted = 0
        return patient_batches(dataset, self.plan.sample_rate)

    def step(self, loss_of_rows: LossOfRows) -> StepStatistics:
        """Draw a batch and take one step; an empty batch is passed over."""
        self.steps_counted += 1
        batch = next(self._batches)
        patients = len(batch[0])
        if not patients:
            return StepStatistics(0)
        total = 0.0
        self.optimizer.zero_grad()
        for image, label in self._passes(*batch):
            loss = loss_of_rows(self.model, flatten_views(image), flatten_views(label))
            (loss * len(image) / patients).backward()
            total += float(loss.detach()) * len(image)
        self.optimizer.step()
        return StepStatistics(patients, total / patients)

    def count_lost_steps(self, steps: int) -> None:
        """Keep the step number in line after a resume."""
        self.steps_counted += steps

    def state_dict(self) -> dict[str, Any]:
        """Optimizer and step count."""
        return {"optimizer": self.optimizer.state_dict(), "steps": self.steps_counted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps_counted = state["steps"]
