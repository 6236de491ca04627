"""The space in which the diffusion happens: pixels, or the latents of an autoencoder.

x_0 = space.encode(image),    image = space.decode(x_0)
"""

from abc import ABC, abstractmethod

from torch import Tensor
from typing_extensions import override

from exact_resume.randomness import Draws


class Space(ABC):
    """The contract: how images become x_0, and x_0 becomes images.

    A space is no ``nn.Module``. Weights that it needs, such as an autoencoder's, are not trained
    and do not enter checkpoints; ``key`` names them instead. The space moves them to the device of
    the tensors that it is called with.

    Attributes:
        clip: the range of x_0, to which samplers clip their estimates; None if it has no bounds.
        smallest: the side of the smallest images that it encodes, in pixels. With it a start tries
            ``encode`` and ``decode``; None for the size of the run.
        image_channels: channels of the images that it encodes.
        cached: whether each image is encoded once, before training. Such a space has ``moments``,
            too (see ``sturdy.pretrained.latents.Latents``).
    """

    clip: tuple[float, float] | None
    smallest: int | None = None
    image_channels: int = 3
    cached: bool = False

    @abstractmethod
    def shape(self, size: int) -> tuple[int, int, int]:
        """Return the shape ``(c, h, w)`` of x_0 for images of ``size x size`` pixels."""

    def shape_of(self, height: int, width: int) -> tuple[int, int, int]:
        """Return the shape ``(c, h, w)`` of x_0 for images of ``height x width`` pixels."""
        channels, rows, _ = self.shape(height)
        return channels, rows, self.shape(width)[2]

    def image_size(self, image: Tensor) -> tuple[int, int] | None:
        """Return height and width in pixels of what ``encode`` takes; None if they are unknown."""
        return None if self.cached else (image.shape[2], image.shape[3])

    @abstractmethod
    def encode(self, image: Tensor, draws: Draws | None) -> Tensor:
        """Return x_0 ``(b, c, h, w)``.

        Args:
            image: a batch as the data module yields it, such as ``(b, 3, h, w)`` in [-1, 1].
            draws: randomness of the ``b`` samples, for spaces that sample x_0; None for the mean of
                x_0, from which an image is edited.
        """

    @abstractmethod
    def decode(self, x0: Tensor) -> Tensor:
        """Return the images ``(b, 3, h, w)`` in [-1, 1] of ``x0``."""

    @abstractmethod
    def key(self) -> str:
        """Return a hash of the weights behind ``encode`` and ``decode``; "" if there are none."""

    def release(self) -> None:  # noqa: B027 (pixels have no weights)
        """Free the device's memory of the weights, which come back when they are needed."""


class Pixels(Space):
    """The identity: x_0 is the image.

    Args:
        channels: of the image.
    """

    clip = (-1.0, 1.0)

    def __init__(self, *, channels: int = 3) -> None:
        self.channels = self.image_channels = channels

    @override
    def shape(self, size: int) -> tuple[int, int, int]:
        return self.channels, size, size

    @override
    def encode(self, image: Tensor, draws: Draws | None) -> Tensor:
        return image

    @override
    def decode(self, x0: Tensor) -> Tensor:
        return x0

    @override
    def key(self) -> str:
        return ""
