"""What a classification run is: frozen dataclasses, read from YAML and the command line."""

from __future__ import annotations

from dataclasses import dataclass, field

from dpkernels.classification.presets import PRESETS
from dpkernels.training.config import PrivacyConfig, RunConfig, TrainingConfig
from dpkernels.training.settings import require

LAYOUTS = ("auto", "folders", "ham10000", "table")


@dataclass(frozen=True)
class SyntheticConfig:
    """The embedded data set, used when `data.root` is empty (see `synthetic.write_synthetic`)."""

    lesions: int = 720
    size: int = 32
    seed: int = 0


@dataclass(frozen=True)
class ImageDataConfig:
    """Where the images are and how one becomes the network's input.

    Attributes:
        root: folder of the data set; "" means the synthetic one.
        layout: "folders" (one folder per class), "ham10000" (HAM10000_metadata.csv and image
            folders), "table" (CSV files with the columns filename,label, as RadImageNet has), or
            "auto": whichever of them fits.
        patients_csv: CSV with columns image,patient_id; overrides what the layout says.
        positive: classes to tell from all others, which makes the task binary; empty: all classes.
        test_share: share of the patients held out for evaluation.
        validation_share: share of the patients held out for the curve during training.
        size: images are resized to size x size pixels.
        channels: 3 for colour, 1 for grey.
        views_per_patient: augmentations per patient and step. They are averaged before clipping.
        augmentations: MONAI dictionary transforms over the key image, on [C, H, W] in [0, 1].
        cache: "memory" keeps resized images in RAM, "none" reads them from disk each time.
    """

    root: str = ""
    layout: str = "auto"
    patients_csv: str = ""
    positive: tuple[str, ...] = ()
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    test_share: float = 0.2
    validation_share: float = 0.0
    size: int = 224
    channels: int = 3
    views_per_patient: int = 4
    augmentations: tuple[dict, ...] = ()
    cache: str = "memory"

    def __post_init__(self) -> None:
        require(self.layout in LAYOUTS, "data.layout", self.layout, f"one of {', '.join(LAYOUTS)}")
        require(0 < self.test_share < 1, "data.test_share", self.test_share, "between 0 and 1")
        require(
            0 <= self.validation_share < 1 - self.test_share,
            "data.validation_share",
            self.validation_share,
            "between 0 and 1 - data.test_share",
        )
        require(self.size >= 8, "data.size", self.size, "at least 8 pixels")
        require(self.channels in (1, 3), "data.channels", self.channels, "1 or 3")
        require(
            self.views_per_patient >= 1,
            "data.views_per_patient",
            self.views_per_patient,
            "at least 1",
        )
        require(self.cache in ("memory", "none"), "data.cache", self.cache, "memory or none")


@dataclass(frozen=True)
class ClassificationConfig(RunConfig):
    """Everything that a classification run depends on."""

    presets = PRESETS

    data: ImageDataConfig
    network: dict
    loss: dict = field(default_factory=lambda: {"_target_": "torch.nn.CrossEntropyLoss"})
    training: TrainingConfig = field(default_factory=TrainingConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    preset: str = ""
