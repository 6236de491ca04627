"""Images by position: which one, its crop, its mirror and its augmentation are functions of (seed,
position).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from exact_resume.randomness import Draws
from sturdy.data.augment import Augment
from sturdy.data.cache import Cache
from sturdy.data.split import Split


class Batch(NamedTuple):
    """Images ``(b, c, h, w)``, uint8 in the loader and float32 in [-1, 1] on the device; labels
    ``(b,)``.
    """

    image: Tensor
    label: Tensor
    positions: NDArray[np.int64]


class Augmented(NamedTuple):
    """A ``Batch``, and what was done to its images, ``(b, Augment.size)``."""

    image: Tensor
    label: Tensor
    positions: NDArray[np.int64]
    condition: Tensor


class Images(Dataset[Batch | Augmented]):
    """The images at given positions, ``size`` by ``size``.

    With a ``seed`` they are cropped, mirrored if ``flip``, and augmented, by the draws of each
    position; without one nothing is random about them and crops are central.
    """

    def __init__(
        self,
        cache: Cache,
        split: Split,
        order: Callable[[NDArray[np.int64]], NDArray[np.int64]],
        *,
        first: int,
        size: int,
        seed: int | None = None,
        flip: bool = False,
        augment: Augment | None = None,
    ) -> None:
        self.cache, self.split, self.order, self.first, self.size = cache, split, order, first, size
        self.seed, self.flip, self.augment = seed, flip, augment

    def __getitem__(self, positions: NDArray[np.int64]) -> Batch | Augmented:
        """The batch at ``positions``, ``(b,)``; without workers or loaders this is all there is to
        it.
        """
        indices = self.split(self.first + self.order(positions))
        labels = torch.from_numpy(self.cache.labels[indices])
        if self.seed is None:
            return Batch(torch.from_numpy(self._pixels(indices, None)), labels, positions)
        draws = Draws(self.seed, positions.tolist())
        image = torch.from_numpy(self._pixels(indices, draws))
        if self.flip:
            flipped = draws.uniform("flip") < 0.5
            image[flipped] = image[flipped].flip(-1)
        if self.augment:
            image, condition = self.augment(image, draws)
            return Augmented(image, labels, positions, condition)
        return Batch(image, labels, positions)

    def _pixels(self, indices: NDArray[np.int64], draws: Draws | None) -> NDArray[np.uint8]:
        if self.cache.uniform and self.cache.image(0).shape[1:] == (self.size, self.size):
            return self.cache.gather(indices)
        centre = np.nextafter(
            np.full((len(indices), 2), 0.5), 0
        )  # just below: of two middles the first
        corners = centre if draws is None else draws.uniform("crop", (2,)).numpy()
        out = np.empty((len(indices), 3, self.size, self.size), np.uint8)
        for row, index, corner in zip(out, indices, corners, strict=True):
            image = self.cache.image(int(index))
            y, x = (corner * (np.array(image.shape[1:]) - self.size + 1)).astype(int)
            row[:] = image[:, y : y + self.size, x : x + self.size]
        return out


def in_sequence(positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """The order of the held-out images: always the same."""
    return positions
