"""From image files to the network's input: decoding, cache, and one row block per patient."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from dpkernels.classification.config import ImageDataConfig
from dpkernels.classification.folders import ImageFolder, Picture
from dpkernels.training.augment import Augmentation, augmented
from dpkernels.training.reading import for_each
from dpkernels.training.sampling import PatientViews

_MODES = {1: "L", 3: "RGB"}


def load_picture(path: str, size: int, channels: int) -> torch.Tensor:
    """Decode and resize an image: [channels, size, size], uint8.

    Raises:
        ValueError: the file is missing, truncated, no image, or deeper than 8 bits.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):  # decoded as 8 bits, all would be black and white
                raise ValueError(
                    f"{path}: pixels of mode {image.mode}, expected 8 bits for each channel; scale "
                    "or window the image first"
                )
            resized = image.convert(_MODES[channels]).resize((size, size), Image.Resampling.BOX)
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(
            f"{path}: not a readable image ({error}); copy or download it again"
        ) from None
    pixels = np.array(resized, dtype=np.uint8).reshape(size, size, channels)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


class ImageStore:
    """Prepared images, read once (cache "memory") or on every access ("none")."""

    def __init__(self, folder: ImageFolder, config: ImageDataConfig) -> None:
        self.folder = folder
        self.config = config
        self._pixels: dict[str, torch.Tensor] = {}

    def read_all(self, on_progress: Callable[[], None] = lambda: None) -> None:
        """Read every image, before any training.

        Raises:
            ValueError: the faulty files, each by name.
        """

        def read(picture: Picture) -> None:
            pixels = self._load(picture)
            if self.config.cache == "memory":
                self._pixels[picture.name] = pixels
            on_progress()

        for_each(self.folder.pictures, read, "images")

    def image(self, picture: Picture) -> torch.Tensor:
        """[C, H, W], float32 in [0, 1]."""
        pixels = self._pixels.get(picture.name)
        return (self._load(picture) if pixels is None else pixels).float() / 255

    def _load(self, picture: Picture) -> torch.Tensor:
        return load_picture(str(picture.path), self.config.size, self.config.channels)


class PatientImages(PatientViews):
    """One item per patient: K augmented images, as adjacent rows.

    A view is drawn from any of the patient's images. What is drawn depends only on the seed, the
    step and the patient, so a resumed run draws what the uninterrupted one would have.
    """

    def __init__(
        self, patients: Sequence[str], store: ImageStore, augment: Augmentation | None, seed: int
    ) -> None:
        self.patients = list(patients)
        self.store = store
        self._augment = augment
        self._seed = seed
        self._pictures = store.folder.patients

    def __len__(self) -> int:
        return len(self.patients)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The patient's views: image [K, C, H, W] float32 and label [K] int64."""
        rng = np.random.default_rng([self._seed, self.step, index])
        pictures = self._pictures[self.patients[index]]
        images, labels = [], []
        for _ in range(self.store.config.views_per_patient):
            picture = pictures[int(rng.integers(len(pictures)))]
            image = self.store.image(picture)
            if self._augment is not None:
                image = augmented(self._augment, {"image": image}, rng)["image"]
            images.append(image)
            labels.append(picture.label)
        return torch.stack(images).contiguous(), torch.tensor(labels)
