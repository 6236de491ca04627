"""Pictures and what is known of them, as every part of a report takes them."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ImageSet:
    """``n`` of them.

    Attributes:
        pixels: uint8 ``(n, 3, h, w)``.
        labels: their classes ``(n,)`` int64; None where there are none, or none was asked for.
        features: ``(n, d)``.
        answers: attributes by name, ``(n,)`` int64 each; empty where they are not known.
    """

    pixels: Tensor
    labels: Tensor | None
    features: Tensor
    answers: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: Tensor | slice) -> "ImageSet":
        labels = None if self.labels is None else self.labels[index]
        answers = {name: values[index] for name, values in self.answers.items()}
        return ImageSet(self.pixels[index], labels, self.features[index], answers)


def scaled(pixels: Tensor) -> Tensor:
    """uint8 to float32 in [-1, 1]."""
    return pixels.float().div(127.5).sub(1)
