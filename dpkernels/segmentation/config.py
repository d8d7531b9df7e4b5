"""What a run is: frozen dataclasses, read from YAML, overridden from the command line.

`network`, `loss`, `training.optimizer` and `data.augmentations` are MONAI ConfigParser blocks: a
`_target_` naming any importable class, and its keyword arguments.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dpkernels.segmentation.presets import preset


@dataclass(frozen=True)
class PhantomConfig:
    """The embedded data set, used when `data.root` is empty (see `phantom.write_phantom`)."""

    patients: int = 112
    size: int = 48
    seed: int = 0


@dataclass(frozen=True)
class DataConfig:
    """Where the scans are and how a scan becomes the network's input.

    Attributes:
        root: a Medical Segmentation Decathlon folder (dataset.json, imagesTr, labelsTr); "" means
            the phantom.
        patients_csv: CSV with columns scan,patient_id; overrides patient_id in dataset.json.
        test_share: share of the patients held out for evaluation.
        validation_share: share of the patients held out for the curve during training.
        shape: resize the whole volume to these voxels; exclusive with `spacing`.
        spacing: resample to this voxel size, millimetres.
        crop: size of a view, voxels; None means the whole volume.
        foreground_share: share of crops centred on a labelled voxel.
        views_per_patient: crops or augmentations of one patient per step. They are averaged
            before clipping: the patient stays the privacy unit.
        intensity: "window" (fixed public window, for CT) or "zscore" (each scan by itself).
        window: [low, high] in Hounsfield units, mapped to [0, 1].
        augmentations: MONAI dictionary transforms over the keys image and label.
        cache: "memory" keeps prepared scans in RAM, "none" reads them from disk each time.
    """

    root: str = ""
    patients_csv: str = ""
    phantom: PhantomConfig = field(default_factory=PhantomConfig)
    test_share: float = 1 / 7
    validation_share: float = 0.0
    shape: tuple[int, ...] | None = None
    spacing: tuple[float, ...] | None = None
    crop: tuple[int, ...] | None = None
    foreground_share: float = 0.5
    views_per_patient: int = 1
    intensity: str = "window"
    window: tuple[float, ...] = (-150.0, 200.0)
    augmentations: tuple[dict, ...] = ()
    cache: str = "memory"

    def __post_init__(self) -> None:
        _require(
            (self.shape is None) != (self.spacing is None),
            "data.shape",
            self.shape,
            "either data.shape or data.spacing, not both and not neither",
        )
        for name in ("shape", "spacing", "crop"):
            value = getattr(self, name)
            _require(
                value is None or (len(value) == 3 and all(v > 0 for v in value)),
                f"data.{name}",
                value,
                "three positive numbers",
            )
        _require(
            self.spacing is None or self.crop is not None,
            "data.crop",
            self.crop,
            "the size of a crop, because data.spacing gives volumes of different sizes",
        )
        _require(0 < self.test_share < 1, "data.test_share", self.test_share, "between 0 and 1")
        _require(
            0 <= self.validation_share < 1 - self.test_share,
            "data.validation_share",
            self.validation_share,
            "between 0 and 1 - data.test_share",
        )
        _require(
            0 <= self.foreground_share <= 1,
            "data.foreground_share",
            self.foreground_share,
            "between 0 and 1",
        )
        _require(
            self.views_per_patient >= 1,
            "data.views_per_patient",
            self.views_per_patient,
            "at least 1",
        )
        _require(
            self.intensity in ("window", "zscore"),
            "data.intensity",
            self.intensity,
            "window or zscore",
        )
        _require(self.cache in ("memory", "none"), "data.cache", self.cache, "memory or none")
        _require(
            len(self.window) == 2 and self.window[0] < self.window[1],
            "data.window",
            self.window,
            "[low, high] with low < high",
        )


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
        for name, least in (
            ("steps", 1),
            ("batch_size", 1),
            ("physical_batch_size", 0),
            ("validate_every", 0),
            ("checkpoint_every", 0),
        ):
            _require(
                getattr(self, name) >= least,
                f"training.{name}",
                getattr(self, name),
                f"at least {least}",
            )
        _require(0 <= self.ema_decay < 1, "training.ema_decay", self.ema_decay, "in [0, 1)")
        _require(
            self.schedule in ("constant", "cosine"),
            "training.schedule",
            self.schedule,
            "constant or cosine",
        )
        _require(
            self.precision in ("float32", "bfloat16"),
            "training.precision",
            self.precision,
            "float32 or bfloat16",
        )


@dataclass(frozen=True)
class PrivacyConfig:
    """The guarantee, per patient.

    Attributes:
        enabled: False trains without any guarantee, for comparison.
        epsilon: target; None when `noise_multiplier` is given.
        delta: probability that the epsilon bound does not hold; well below 1 / patients.
        noise_multiplier: std of the noise divided by max_grad_norm; None: found from `epsilon`.
        max_grad_norm: bound on one patient's gradient.
        accountant: "tight", "rdp", "prv" or "gdp".
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
        _require(
            not self.enabled or (self.epsilon is None) != (self.noise_multiplier is None),
            "privacy.epsilon",
            self.epsilon,
            "either privacy.epsilon or privacy.noise_multiplier, not both and not neither",
        )
        for name in ("epsilon", "noise_multiplier"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"privacy.{name}", value, "positive")
        _require(0 < self.delta < 1, "privacy.delta", self.delta, "between 0 and 1")
        _require(self.max_grad_norm > 0, "privacy.max_grad_norm", self.max_grad_norm, "positive")


@dataclass(frozen=True)
class EvaluationConfig:
    """Sliding-window evaluation on the native grid.

    Attributes:
        overlap: share of a window shared with its neighbour.
        overlays: number of held-out cases drawn as pictures.
        surface_distance: also compute the 95th percentile Hausdorff distance, millimetres.
    """

    overlap: float = 0.5
    overlays: int = 3
    surface_distance: bool = True

    def __post_init__(self) -> None:
        _require(0 <= self.overlap < 1, "evaluation.overlap", self.overlap, "in [0, 1)")


@dataclass(frozen=True)
class SegmentationConfig:
    """Everything that a run depends on; `config.yaml` in the run folder is this, resolved."""

    data: DataConfig
    network: dict
    loss: dict
    training: TrainingConfig = field(default_factory=TrainingConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    preset: str = ""

    def __post_init__(self) -> None:
        for name in ("network", "loss"):
            _require(
                "_target_" in getattr(self, name),
                name,
                getattr(self, name),
                "a block with `_target_` naming a class",
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SegmentationConfig:
        """Build from nested dictionaries; unknown keys and wrong types are refused by name."""
        return _build(cls, values, "")

    @classmethod
    def from_preset(cls, name: str, changes: dict[str, Any] | None = None) -> SegmentationConfig:
        """A preset with nested `changes` laid over it.

        Raises:
            ValueError: no such preset, or a faulty change.
        """
        return cls.from_dict(merge({**preset(name), "preset": name}, changes or {}))

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionaries and lists only, as written to YAML."""
        return _plain(dataclasses.asdict(self))


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file of configuration.

    Raises:
        ValueError: the file is missing, is not YAML, or is not a mapping.
    """
    try:
        values = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise ValueError(f"--config: no such file: {path}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"--config: {path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"--config: {path} must hold a mapping, found {type(values).__name__}")
    return values


def merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """`base` with `change` laid over it; a block with another `_target_` replaces the old one."""
    merged = dict(base)
    for key, value in change.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            kept = value.get("_target_", old.get("_target_")) == old.get("_target_")
            merged[key] = merge(old, value) if kept else value
        else:
            merged[key] = value
    return merged


def parse_override(text: str) -> dict[str, Any]:
    """`network.channels=[16,32]` as nested dictionaries; the value is YAML.

    Raises:
        ValueError: no equals sign, or a value that is not YAML.
    """
    path, found, value = text.partition("=")
    if not found or not path.strip():
        raise ValueError(f"--set expects section.name=value, got {text!r}")
    try:
        parsed = _scientific(yaml.safe_load(value))
    except yaml.YAMLError as error:
        raise ValueError(f"--set {path}: {value!r} is not YAML: {error}") from None
    return nest(path.strip(), parsed)


def nest(path: str, value: Any) -> dict[str, Any]:
    """`a.b` and a value as {a: {b: value}}."""
    nested = value
    for key in reversed(path.split(".")):
        nested = {key: nested}
    return nested


def _scientific(value: Any) -> Any:
    """YAML 1.1 reads 1e-5 as text; everybody means the number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _build(cls: type, values: Any, prefix: str) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{prefix[:-1] or 'configuration'} must be a mapping, got {values!r}")
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            close = difflib.get_close_matches(str(key), hints, n=1)
            hint = (
                f"; did you mean {close[0]}?" if close else f"; expected one of {', '.join(hints)}"
            )
            raise ValueError(f"unknown setting {prefix}{key}{hint}")
    return cls(**{k: _convert(hints[k], v, f"{prefix}{k}") for k, v in values.items()})


def _convert(hint: Any, value: Any, name: str) -> Any:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _build(hint, value, f"{name}.")
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    target = next(o for o in options if o is not type(None))
    origin = typing.get_origin(target) or target
    value = _scientific(value) if target in (int, float) else value
    if origin is tuple:
        _require(isinstance(value, (list, tuple)), name, value, "a list")
        item = typing.get_args(target)[0]
        return tuple(_convert(item, v, f"{name}[{i}]") for i, v in enumerate(value))
    if target is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if target is int and isinstance(value, float) and value.is_integer():
        return int(value)
    right = isinstance(value, origin) and not (target is int and isinstance(value, bool))
    _require(right, name, value, f"a value of type {origin.__name__}")
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def _require(condition: bool, name: str, value: Any, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name} must be {expected}; got {value!r}")
