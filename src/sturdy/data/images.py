"""Batches of images by position.

    batch = f(seed, positions)

Which image is taken, its crop, its flip and its augmentation are functions of seed and position.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from exact_resume.randomness import Draws
from sturdy.data.augment import Augment
from sturdy.data.cache import Cache
from sturdy.data.split import Order, Split
from sturdy.image_size import ImageSize, height_and_width


class Batch(NamedTuple):
    """Images with their labels.

    Attributes:
        image: ``(b, c, h, w)``; uint8 in the loader, float32 in [-1, 1] on the device. Or float32
            moments ``(b, 2 c, h, w)`` of encoded images.
        label: ``(b,)``: the row of the caption if there are captions, else the class, and 0 when
            there are no labels.
        positions: ``(b,)``, of the samples in the run.
    """

    image: Tensor
    label: Tensor
    positions: NDArray[np.int64]


class AugmentedBatch(NamedTuple):
    """A ``Batch`` of augmented images; ``augmentation`` describes how, ``(b, Augment.size)``."""

    image: Tensor
    label: Tensor
    positions: NDArray[np.int64]
    augmentation: Tensor


class ImageDataset(Dataset[Batch | AugmentedBatch]):
    """The images at given positions, cropped to ``size``, or whole.

    Args:
        cache: the decoded images.
        split: its places are given by ``first + order(positions)``.
        order: the order of the images by position; ``None`` for the order of ``split``.
        first: the first place in ``split``.
        size: height and width of the crops, in pixels; one number for squares; ``None`` for whole
            images, all of a batch of one size.
        seed: crops, flips and augmentation are drawn from it and the position. Without a seed,
            crops are central and nothing else is done.
        flip: whether to mirror every second image.
        augment: whether and how to augment.
        moments: the cache of ``EncodedImages``, whose moments take the place of pixels.
    """

    def __init__(
        self,
        cache: Cache,
        split: Split,
        order: Order | None = None,
        *,
        first: int = 0,
        size: ImageSize | None,
        seed: int | None = None,
        flip: bool = False,
        augment: Augment | None = None,
        moments: Cache | None = None,
    ) -> None:
        self.cache = cache
        self.split = split
        self.order = order
        self.first = first
        self.size = size
        self.seed = seed
        self.flip = flip
        self.augment = augment
        self.moments = moments

    def __getitem__(self, positions: NDArray[np.int64]) -> Batch | AugmentedBatch:
        """Return the batch at ``positions``, ``(b,)``."""
        indices = self._indices(positions)
        rows = self.cache.caption_rows
        label = torch.from_numpy((self.cache.labels if rows is None else rows)[indices])
        if self.seed is None:
            return Batch(self._images(indices, None), label, positions)
        draws = Draws(self.seed, positions.tolist())
        image = self._images(indices, draws)
        if self.augment:
            image, augmentation = self.augment(image, draws)
            return AugmentedBatch(image, label, positions, augmentation)
        return Batch(image, label, positions)

    def classes(self, positions: NDArray[np.int64]) -> Tensor:
        """Return the class of each image, ``(b,)``, also where labels are rows of captions."""
        return torch.from_numpy(self.cache.labels[self._indices(positions)])

    def _indices(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        places = self.order(positions) if self.order else positions
        return self.split.indices(self.first + places)

    def _images(self, indices: NDArray[np.int64], draws: Draws | None) -> Tensor:
        """Return crops ``(b, c, h, w)`` or moments, of mirrored images where it is drawn."""
        flipped = self._flipped(draws, len(indices))
        if self.moments:
            rows = indices + len(self.cache) * flipped.numpy()
            return torch.from_numpy(np.stack([self.moments.image(row) for row in rows]))
        image = torch.from_numpy(self._crops(indices, draws))
        if flipped.any():
            image[flipped] = image[flipped].flip(-1)
        return image

    def _flipped(self, draws: Draws | None, count: int) -> Tensor:
        """Return which of ``count`` images are mirrored, ``(count,)`` bool: none without draws."""
        if draws is None or not self.flip:
            return torch.zeros(count, dtype=torch.bool)
        return draws.uniform("flip") < 0.5

    def _crops(self, indices: NDArray[np.int64], draws: Draws | None) -> NDArray[np.generic]:
        """Return crops ``(b, c, h, w)``: at drawn places, or in the middle without draws."""
        shapes = self.cache.shapes[indices]  # (b, 2)
        height, width = shapes[0].tolist() if self.size is None else height_and_width(self.size)
        room = shapes - (height, width)
        if self.size is None and room.any():
            raise ValueError("the images of this batch have several sizes, and are not cropped")
        if draws is None or not room.any():
            # Just below 0.5: of two pixels in the middle, the first.
            places = np.full(room.shape, np.nextafter(0.5, 0))
        else:
            places = draws.uniform("crop", (2,)).numpy()
        corners = (places * (room + 1)).astype(int)
        crops = np.empty((len(indices), self.cache.channels, height, width), self.cache.dtype)
        images = self.cache.images(indices)
        for crop, image, (y, x) in zip(crops, images, corners, strict=True):
            crop[:] = image[:, y : y + height, x : x + width]
        return crops


def as_float(image: Tensor) -> Tensor:
    """Convert to float32, uint8 to [-1, 1]."""
    converted = image.float()
    return converted.div_(127.5).sub_(1) if image.dtype == torch.uint8 else converted
