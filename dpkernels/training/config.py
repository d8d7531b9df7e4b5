"""What every training run has: steps, batch and optimizer; and the guarantee."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from typing_extensions import Self

from dpkernels.accounting.accountants import guaranteeing
from dpkernels.training.settings import build, merge, plain, require, require_all


@dataclass(frozen=True)
class DatasetConfig:
    """What every task asks of its data; a task adds how a record becomes the network's input.

    Attributes:
        root: folder of the data set; "" means the embedded one.
        patients_csv: CSV that says whose each record is; overrides what the data set says.
        test_share: share of the patients held out for evaluation.
        validation_share: share of the patients held out for the curve during training.
        views_per_patient: crops or augmentations of one patient per step. They are averaged
            before clipping: the patient stays the privacy unit.
        augmentations: MONAI dictionary transforms over the keys image and label.
        cache: "memory" keeps prepared records in RAM, "none" reads them from disk each time.
    """

    root: str = ""
    patients_csv: str = ""
    test_share: float = 0.2
    validation_share: float = 0.0
    views_per_patient: int = 1
    augmentations: tuple[dict, ...] = ()
    cache: str = "memory"

    def __post_init__(self) -> None:
        left = 1 - self.test_share
        rules = {
            "test_share": (0 < self.test_share < 1, "between 0 and 1"),
            "validation_share": (
                0 <= self.validation_share < left,
                "between 0 and 1 - data.test_share",
            ),
            "views_per_patient": (self.views_per_patient >= 1, "at least 1"),
            "cache": (self.cache in ("memory", "none"), "memory or none"),
        }
        require_all(self, "data", rules)


@dataclass(frozen=True)
class TrainingConfig:
    """Steps, batch, optimizer and reproducibility.

    Attributes:
        steps: optimizer steps; every one is counted, also those on an empty Poisson batch.
        batch_size: expected patients per step; the sample rate is batch_size / N.
        physical_batch_size: patients per forward pass (memory only, no effect on privacy); 0: all.
        optimizer: `_target_` block without params.
        schedule: "constant" or "cosine" (to zero over `steps`) for the learning rate.
        ema_decay: of the averaged weights used for evaluation; 0 switches them off.
        seed: of initialisation, split and augmentation. Noise and sampling never use it.
        precision: "float32" or "bfloat16" (autocast).
        device: "auto", "cpu", "cuda" or "cuda:N".
        validate_every: steps between validations; 0: never.
        checkpoint_every: steps between checkpoints; 0: about two a minute.
        init_from: checkpoint to fine-tune from.
        train_layers: glob patterns of parameter names to train; empty: all.
    """

    steps: int = 100
    batch_size: int = 16
    physical_batch_size: int = 0
    optimizer: dict = field(default_factory=lambda: {"_target_": "torch.optim.NAdam", "lr": 2e-3})
    schedule: str = "constant"
    ema_decay: float = 0.0
    seed: int = 0
    precision: str = "float32"
    device: str = "auto"
    validate_every: int = 0
    checkpoint_every: int = 0
    init_from: str = ""
    train_layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        least = {"steps": 1, "batch_size": 1, "physical_batch_size": 0, "validate_every": 0}
        least |= {"checkpoint_every": 0, "seed": 0}
        rules = {n: (getattr(self, n) >= low, f"at least {low}") for n, low in least.items()}
        rules |= {
            "ema_decay": (0 <= self.ema_decay < 1, "in [0, 1)"),
            "schedule": (self.schedule in ("constant", "cosine"), "constant or cosine"),
            "precision": (self.precision in ("float32", "bfloat16"), "float32 or bfloat16"),
        }
        require_all(self, "training", rules)


@dataclass(frozen=True)
class PrivacyConfig:
    """The guarantee, per patient.

    Attributes:
        enabled: False trains without any guarantee, for comparison.
        epsilon: target; None when `noise_multiplier` is given.
        delta: probability that the epsilon bound does not hold; well below 1 / patients.
        noise_multiplier: std of the noise divided by max_grad_norm; None: found from `epsilon`.
        max_grad_norm: bound on one patient's gradient.
        accountant: name of one whose epsilon is never below the exact one: "tight", "rdp", "prv".
        insecure_fixed_noise: seed for noise and sampling, for tests only: whoever knows it can
            subtract the noise, so there is no guarantee; the report says so.
    """

    enabled: bool = True
    epsilon: float | None = 8.0
    delta: float = 1e-5
    noise_multiplier: float | None = None
    max_grad_norm: float = 1.0
    accountant: str = "tight"
    insecure_fixed_noise: int | None = None

    def __post_init__(self) -> None:
        require(
            not self.enabled or (self.epsilon is None) != (self.noise_multiplier is None),
            "privacy.epsilon",
            self.epsilon,
            "either privacy.epsilon or privacy.noise_multiplier, not both and not neither",
        )
        for name in ("epsilon", "noise_multiplier"):
            value = getattr(self, name)
            require(value is None or value > 0, f"privacy.{name}", value, "positive")
        require(0 < self.delta < 1, "privacy.delta", self.delta, "between 0 and 1")
        seed = self.insecure_fixed_noise
        require(seed is None or seed >= 0, "privacy.insecure_fixed_noise", seed, "at least 0")
        *names, last = guaranteeing()
        require(
            self.accountant in (*names, last),
            "privacy.accountant",
            self.accountant,
            f"{', '.join(names)} or {last} (another one can state less than the true epsilon, "
            "so that no guarantee can rest on it)",
        )
        require(self.max_grad_norm > 0, "privacy.max_grad_norm", self.max_grad_norm, "positive")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that a run depends on; `config.yaml` in the run folder is this, resolved.

    The base of one frozen dataclass per task, which names the class of its `data`. `network` and
    `loss` are MONAI ConfigParser blocks: a `_target_` naming any importable class, and its keyword
    arguments.
    """

    #: named starting points, nested dictionaries that hold every setting without a default
    presets: ClassVar[Mapping[str, dict[str, Any]]] = {}

    data: DatasetConfig
    network: dict
    loss: dict = field(default_factory=lambda: {"_target_": "torch.nn.CrossEntropyLoss"})
    training: TrainingConfig = field(default_factory=TrainingConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    preset: str = ""

    def __post_init__(self) -> None:
        for name in ("network", "loss"):
            block = getattr(self, name)
            require("_target_" in block, name, block, "a block with `_target_` naming a class")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from nested dictionaries; unknown keys and wrong types are refused by name."""
        return build(cls, values, "")

    @classmethod
    def preset_values(cls, name: str) -> dict[str, Any]:
        """The nested dictionaries of a preset.

        Raises:
            ValueError: no preset of that name.
        """
        if name not in cls.presets:
            raise ValueError(f"--preset must be one of {', '.join(cls.presets)}; got {name!r}")
        return {**cls.presets[name], "preset": name}

    @classmethod
    def from_preset(cls, name: str, changes: dict[str, Any] | None = None) -> Self:
        """A preset with nested `changes` laid over it.

        Raises:
            ValueError: no such preset, or a faulty change.
        """
        return cls.from_dict(merge(cls.preset_values(name), changes or {}))

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionaries and lists only, as written to YAML."""
        return plain(dataclasses.asdict(self))
