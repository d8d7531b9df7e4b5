"""From image files to the network's input: decoding and resizing."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from dpkernels.classification.config import ImageDataConfig
from dpkernels.classification.folders import ImageFolder, Picture
from dpkernels.training.store import RecordStore

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


class ImageStore(RecordStore[Picture, torch.Tensor]):
    """Images [C, H, W], uint8, of one size."""

    record = "image"
    folder: ImageFolder
    config: ImageDataConfig

    def load(self, picture: Picture) -> torch.Tensor:
        """See `RecordStore`."""
        return load_picture(str(picture.path), self.config.size, self.config.channels)

    def image(self, picture: Picture) -> torch.Tensor:
        """[C, H, W], float32 in [0, 1]."""
        return self.item(picture).float() / 255

    def view(self, picture: Picture, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """The image, and its label as an int64 scalar."""
        return self.image(picture), torch.tensor(picture.label)
