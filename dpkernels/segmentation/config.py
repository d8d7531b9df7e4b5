"""What a segmentation run is: frozen dataclasses, read from YAML and the command line."""

from __future__ import annotations

from dataclasses import dataclass, field

from dpkernels.segmentation.presets import PRESETS
from dpkernels.training.config import DatasetConfig, RunConfig
from dpkernels.training.settings import require, require_all


@dataclass(frozen=True)
class PhantomConfig:
    """The embedded data set, used when `data.root` is empty (see `phantom.write_phantom`)."""

    patients: int = 112
    size: int = 48
    seed: int = 0


@dataclass(frozen=True)
class DataConfig(DatasetConfig):
    """Where the scans are and how a scan becomes the network's input.

    `root` is a Medical Segmentation Decathlon folder (dataset.json, imagesTr, labelsTr), or in
    another of `layouts.LAYOUTS`; `patients_csv` has the columns scan,patient_id.

    Attributes:
        phantom: the data set that is used when `root` is empty.
        shape: resize the whole volume to these voxels; exclusive with `spacing`.
        spacing: resample to this voxel size, millimetres.
        crop: size of a view, voxels; None means the whole volume.
        foreground_share: share of crops centred on a labelled voxel.
        intensity: "window" (fixed public window, for CT) or "zscore" (each scan by itself).
        window: [low, high] in Hounsfield units, mapped to [0, 1].
    """

    phantom: PhantomConfig = field(default_factory=PhantomConfig)
    test_share: float = 1 / 7
    shape: tuple[int, ...] | None = None
    spacing: tuple[float, ...] | None = None
    crop: tuple[int, ...] | None = None
    foreground_share: float = 0.5
    intensity: str = "window"
    window: tuple[float, ...] = (-150.0, 200.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("shape", "spacing", "crop"):
            value = getattr(self, name)
            right = value is None or (len(value) == 3 and all(v > 0 for v in value))
            require(right, f"data.{name}", value, "three positive numbers")
        rules = {
            "shape": (
                (self.shape is None) != (self.spacing is None),
                "either data.shape or data.spacing, not both and not neither",
            ),
            "crop": (
                self.spacing is None or self.crop is not None,
                "the size of a crop, because data.spacing gives volumes of different sizes",
            ),
            "foreground_share": (0 <= self.foreground_share <= 1, "between 0 and 1"),
            "intensity": (self.intensity in ("window", "zscore"), "window or zscore"),
            "window": (
                len(self.window) == 2 and self.window[0] < self.window[1],
                "[low, high] with low < high",
            ),
        }
        require_all(self, "data", rules)


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


@dataclass(frozen=True, kw_only=True)
class SegmentationConfig(RunConfig):
    """Everything that a segmentation run depends on."""

    presets = PRESETS

    data: DataConfig
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
