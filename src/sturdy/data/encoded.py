"""Images encoded once: a source of what an autoencoder makes of each image of a cache.

    moments of image i, ..., moments of mirrored image i, ...

An encoder is slow and gives the same numbers every time. Its moments, a mean and a standard
deviation for each number of the latent, are enough to draw the latent anew at every position.
"""

import hashlib
import json
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sturdy.data.cache import Cache
from sturdy.data.images import as_float
from sturdy.image_size import ImageSize, height_and_width


class ImageEncoder(Protocol):
    """What encodes images, such as ``sturdy.pretrained.latents.Latents``."""

    def shape(self, size: int) -> tuple[int, int, int]:
        """Return the shape ``(c, h, w)`` of the latent of an image of ``size x size`` pixels."""

    def moments(self, image: Tensor) -> Tensor:
        """Return mean and standard deviation ``(1, 2 c, h, w)`` of an image ``(1, 3, h, w)``.

        They are float32.
        """

    def key(self) -> str:
        """Return a hash of all that ``moments`` depends on beside the image."""


class EncodedImages:
    """A ``Source`` of the moments of the n images of a cache, float32.

    Args:
        images: the decoded images, all of one size.
        encoder: called with one image at a time.
        size: height and width of the images; one number for squares.
        mirrored: whether the n mirrored images follow: the latent of a mirrored image is not the
            mirrored latent.
        device: where images are encoded.

    Attributes:
        channels: 2 c.
        key: changes with the pixels, ``size``, ``mirrored`` and the encoder, and not with labels.
        encoded: number of the images that were encoded.
    """

    classes: tuple[str, ...] = ()
    dtype = "float32"

    def __init__(
        self,
        images: Cache,
        encoder: ImageEncoder,
        *,
        size: ImageSize,
        mirrored: bool,
        device: str | torch.device = "cpu",
    ) -> None:
        self.images = images
        self.encoder = encoder
        self.mirrored = mirrored
        self.device = device
        self.channels = 2 * encoder.shape(height_and_width(size)[0])[0]
        self.encoded = 0
        parts = ["moments", images.digest_of_images, size, encoder.key(), mirrored]
        self.key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.images) * (2 if self.mirrored else 1)

    def label(self, index: int) -> int:
        """Return 0; the labels are in the cache of the images."""
        return 0

    def name(self, index: int) -> str:
        """Return the name of the image."""
        return self.images.names[index % len(self.images)]

    def decode(self, index: int) -> np.ndarray:
        """Return moments, ``(2 c, h, w)``."""
        image = torch.from_numpy(self.images.image(index % len(self.images)).copy())
        if index >= len(self.images):
            image = image.flip(-1)
        self.encoded += 1
        moments = self.encoder.moments(as_float(image[None].to(self.device)))
        return moments[0].cpu().numpy()
