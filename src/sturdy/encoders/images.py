"""A set of images with labels, features and attributes."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageSet:
    """``n`` images.

    Attributes:
        pixels: uint8 ``(n, c, h, w)``.
        labels: classes ``(n,)`` int64; None without classes, or if no class was asked for.
        features: ``(n, d)``.
        answers: attributes by name, ``(n,)`` int64 each; empty if they are unknown.
    """

    pixels: Tensor
    labels: Tensor | None
    features: Tensor
    answers: Mapping[str, Tensor]

    def __len__(self) -> int:
        """Return ``n``."""
        return len(self.pixels)

    def __getitem__(self, index: Tensor | slice) -> "ImageSet":
        """Return the images at ``index``."""
        labels = None if self.labels is None else self.labels[index]
        answers = {name: values[index] for name, values in self.answers.items()}
        return ImageSet(self.pixels[index], labels, self.features[index], answers)


def scaled(pixels: Tensor) -> Tensor:
    """Convert uint8 to float32 in [-1, 1]."""
    return pixels.float().div(127.5).sub(1)


def unscaled(images: Tensor) -> Tensor:
    """Convert float images in [-1, 1] to uint8, which is returned as it is."""
    if images.dtype == torch.uint8:
        return images
    return images.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def as_rgb(images: Tensor) -> Tensor:
    """Return images ``(..., c, h, w)`` with three channels: grey ones are repeated.

    Raises:
        ValueError: they have another number of channels than 1 or 3.
    """
    channels = images.shape[-3]
    if channels == 3:
        return images
    if channels != 1:
        raise ValueError(
            f"images of {channels} channels are neither grey nor RGB, and cannot be compared or "
            f"shown as such"
        )
    return images.expand(*images.shape[:-3], 3, *images.shape[-2:])
