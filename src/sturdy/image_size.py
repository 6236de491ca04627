"""The size of images: a number for squares, else height and width. It imports nothing."""

from collections.abc import Sequence

ImageSize = int | Sequence[int]


def height_and_width(size: ImageSize) -> tuple[int, int]:
    """Return the height and the width of images of ``size``, in pixels."""
    height, width = size if isinstance(size, Sequence) else (size, size)
    return height, width


def describe_size(size: ImageSize) -> str:
    """Return height and width as in ``"64 x 96"``."""
    height, width = height_and_width(size)
    return f"{height} x {width}"
