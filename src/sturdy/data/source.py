"""What a source of images is, and how it says that one of them cannot be used."""

from typing import Protocol

import numpy as np


class BadImageError(Exception):
    """An image that cannot be used; the message is a short plain reason."""


class ImageTooSmallError(BadImageError):
    """An image that is whole, and smaller than the user accepts."""


class Source(Protocol):
    """A finite collection of images that can be decoded one by one, from several threads at once.

    It may also have ``content(index) -> bytes``: bytes that tell the image from all others and stay
    the same at any image size, such as those of its file. ``data.split=content`` is decided by
    them; else by the decoded pixels.

    It may also have ``understood()``, lines that tell the user what it found and what it left out,
    and two sets of
    indices that it fills while it decodes: ``scaled_up``, of images smaller than what is made of
        them, and ``deep``, of
    those with more than 8 bits of grey.
    """

    classes: tuple[str, ...]
    """Label ``k`` is ``classes[k]``; empty when unlabelled."""
    key: str
    """Changes whenever ``decode`` or ``label`` of any index could give something else."""

    def __len__(self) -> int: ...

    def label(self, index: int) -> int:
        """The number of the class, 0 when unlabelled."""

    def name(self, index: int) -> str:
        """What to call the image in messages and tables."""

    def decode(self, index: int) -> np.ndarray:
        """The image, uint8 ``(3, h, w)``; raises ``BadImageError`` with the reason."""
