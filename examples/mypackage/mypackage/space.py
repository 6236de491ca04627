"""A space."""

from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from exact_resume.randomness import Draws
from sturdy.diffusion.space import Space


class Squares(Space):
    """Every 2 x 2 square of an image is one position of four times as many channels.

    An autoencoder has the same five members.

    Args:
        channels: of x_0; the backbone's config reads it as ``${space.channels}``.
    """

    clip = (-1.0, 1.0)

    def __init__(self, *, channels: int = 12) -> None:
        self.channels = channels

    @override
    def shape(self, size: int) -> tuple[int, int, int]:
        return self.channels, size // 2, size // 2

    @override
    def encode(self, image: Tensor, draws: Draws | None) -> Tensor:
        return F.pixel_unshuffle(image, 2)

    @override
    def decode(self, x0: Tensor) -> Tensor:
        return F.pixel_shuffle(x0, 2)

    @override
    def key(self) -> str:
        return ""  # there are no weights
