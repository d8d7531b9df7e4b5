"""What a classification run is: frozen dataclasses, read from YAML and the command line."""

from __future__ import annotations

from dataclasses import dataclass, field

from dpkernels.classification.folders import LAYOUTS
from dpkernels.classification.presets import PRESETS
from dpkernels.training.config import DatasetConfig, RunConfig
from dpkernels.training.settings import require_all


@dataclass(frozen=True)
class SyntheticConfig:
    """The embedded data set, used when `data.root` is empty (see `synthetic.write_synthetic`)."""

    lesions: int = 720
    size: int = 32
    seed: int = 0


@dataclass(frozen=True)
class ImageDataConfig(DatasetConfig):
    """Where the images are and how one becomes the network's input.

    `patients_csv` has the columns image,patient_id; `augmentations` act on the key image, on
    [C, H, W] in [0, 1].

    Attributes:
        layout: "folders" (one folder per class), "ham10000" (HAM10000_metadata.csv and image
            folders), "table" (CSV files with the columns filename,label, as RadImageNet has),
            another of `folders.LAYOUTS`, or "auto": whichever of them fits.
        positive: classes to tell from all others, which makes the task binary; empty: all classes.
        synthetic: the data set that is used when `root` is empty.
        size: images are resized to size x size pixels.
        channels: 3 for colour, 1 for grey.
    """

    layout: str = "auto"
    positive: tuple[str, ...] = ()
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    size: int = 224
    channels: int = 3
    views_per_patient: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        layouts = ("auto", *LAYOUTS)
        rules = {
            "layout": (self.layout in layouts, f"one of {', '.join(layouts)}"),
            "size": (self.size >= 8, "at least 8 pixels"),
            "channels": (self.channels in (1, 3), "1 or 3"),
        }
        require_all(self, "data", rules)


@dataclass(frozen=True, kw_only=True)
class ClassificationConfig(RunConfig):
    """Everything that a classification run depends on."""

    presets = PRESETS

    data: ImageDataConfig
