"""What a run is: frozen dataclasses, read from YAML, overridden from the command line.

`network`, `loss`, `training.optimizer` and `data.augmentations` are MONAI ConfigParser blocks: a
`_target_` naming any importable class, and its keyword arguments.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dpkernels.segmentation.presets import PRESETS
from dpkernels.training.config import PrivacyConfig, RunConfig, TrainingConfig
from dpkernels.training.settings import require


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
        require(
            (self.shape is None) != (self.spacing is None),
            "data.shape",
            self.shape,
            "either data.shape or data.spacing, not both and not neither",
        )
        for name in ("shape", "spacing", "crop"):
            value = getattr(self, name)
            require(
                value is None or (len(value) == 3 and all(v > 0 for v in value)),
                f"data.{name}",
                value,
                "three positive numbers",
            )
        require(
            self.spacing is None or self.crop is not None,
            "data.crop",
            self.crop,
            "the size of a crop, because data.spacing gives volumes of different sizes",
        )
        require(0 < self.test_share < 1, "data.test_share", self.test_share, "between 0 and 1")
        require(
            0 <= self.validation_share < 1 - self.test_share,
            "data.validation_share",
            self.validation_share,
            "between 0 and 1 - data.test_share",
        )
        require(
            0 <= self.foreground_share <= 1,
            "data.foreground_share",
            self.foreground_share,
            "between 0 and 1",
        )
        require(
            self.views_per_patient >= 1,
            "data.views_per_patient",
            self.views_per_patient,
            "at least 1",
        )
        require(
            self.intensity in ("window", "zscore"),
            "data.intensity",
            self.intensity,
            "window or zscore",
        )
        require(self.cache in ("memory", "none"), "data.cache", self.cache, "memory or none")
        require(
            len(self.window) == 2 and self.window[0] < self.window[1],
            "data.window",
            self.window,
            "[low, high] with low < high",
        )


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
        require(0 <= self.overlap < 1, "evaluation.overlap", self.overlap, "in [0, 1)")


@dataclass(frozen=True)
class SegmentationConfig(RunConfig):
    """Everything that a segmentation run depends on."""

    presets = PRESETS

    data: DataConfig
    network: dict
    loss: dict
    training: TrainingConfig = field(default_factory=TrainingConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    preset: str = ""
