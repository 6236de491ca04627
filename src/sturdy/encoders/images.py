"""A set of images with labels, features and attributes."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ImageSet:
    """``n`` images.

    Attributes:
        pixels: uint8 ``(n, 3, h, w)``.
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
