"""The seam of this package: a source of images, and the errors by which it refuses one of them."""

from typing import NamedTuple, Protocol

import numpy as np


class BadImageError(Exception):
    """An image cannot be used; the message is a short plain reason."""


class ImageTooSmallError(BadImageError):
    """An image is intact, but smaller than the user accepts."""


def check_file_size(size: int, limit: int) -> None:
    """Raise ``BadImageError`` if a file of ``size`` bytes is over the limit."""
    if size > limit:
        raise BadImageError(f"{size / 1e6:,.0f} MB is over the limit of {limit / 1e6:,.0f} MB")


class Source(Protocol):
    """A finite collection of images, which are decoded one by one.

    A class need not inherit from it. ``decode`` is called from several threads at once.

    A source may also have:

    - ``channels``, the number of channels of each image (3 where it has none), and ``dtype``, the
      name of their NumPy type (``"uint8"`` where it has none). ``uint8`` becomes [-1, 1] in
      training; another type stays as it is.
    - ``content(index) -> bytes``: bytes that identify the image and do not depend on the image
      size, such as those of its file. ``split="content"`` is decided by them; without them it is
      decided by the decoded pixels.
    - ``captions``, the distinct captions, a tuple of texts without the empty one, and
      ``caption(index) -> int``: the row in ``captions`` of the image's caption, and their number
      where it is empty. Batches then have this row as label. ``key`` must change with them.
    - ``summary_lines() -> list[str]``: lines that tell the user which images were found.
    - ``write_tables(path)``: writes a cache without pixels into the new folder ``path`` and returns
      the broken images. The images are then read and decoded at every use (``StreamedImages``).
    - ``scaled_up`` and ``deep``: sets that ``decode`` fills with the indices of images that were
      smaller than their decoded size, and of images with more than 8 bits of grey.
    - ``cut``: a dictionary in which ``decode`` keeps the share of an image that it cut off to fit a
      bucket, by index.

    Attributes:
        classes: the name of each class; empty when the images have no labels.
        key: changes whenever ``decode`` or ``label`` of any index could return something else.
    """

    classes: tuple[str, ...]
    key: str

    def __len__(self) -> int: ...

    def label(self, index: int) -> int:
        """Return the index of the image's class in ``classes``; 0 when there are no labels."""

    def name(self, index: int) -> str:
        """Return the name of the image in messages and tables."""

    def decode(self, index: int) -> np.ndarray:
        """Return the image, ``(channels, h, w)``.

        Raises:
            BadImageError: the image cannot be used.
        """


class PixelFormat(NamedTuple):
    """The number of channels and the NumPy type of the images of a source."""

    channels: int = 3
    dtype: str = "uint8"


def pixel_format(source: Source) -> PixelFormat:
    """Return the format of the images that ``source`` decodes."""
    default = PixelFormat()
    channels = getattr(source, "channels", default.channels)
    dtype = getattr(source, "dtype", default.dtype)
    return PixelFormat(channels, np.dtype(dtype).name)
