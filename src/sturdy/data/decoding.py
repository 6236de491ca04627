"""What all sources of image files have in common, wherever the files are."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np

from sturdy.data.buckets import parse_buckets
from sturdy.data.checks import check_choice, check_colour, check_int
from sturdy.data.decode import Crop, decode_file, max_bytes


class DecodingSource(ABC):
    """Decodes the images of a source from the bytes of their files.

    Args:
        image_size: the short side of the decoded images, in pixels.
        crop: ``"center"`` gives ``(3, image_size, image_size)``; ``"random"`` leaves the long side
            uncut.
        background: the colour behind transparent pixels: a name, or red, green and blue up to 255.
        max_pixels: most pixels an image may have; one with more is broken.
        min_side: fewest pixels of the short side; smaller images are left out. With ``None`` they
            are scaled up.
        buckets: several sizes in place of ``image_size``, as of ``parse_buckets``; each image is
            cut to the nearest.

    Attributes:
        decoding: the arguments of ``decode_file``. The ``key`` of a source contains them.
        scaled_up: indices of images decoded so far that were smaller than ``image_size``.
        deep: indices of images decoded so far with more than 8 bits of grey.
        cut: the share that was cut off each image decoded so far, by its index, to fit a bucket.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        *,
        image_size: int,
        crop: Crop,
        background: str | Sequence[int],
        max_pixels: int,
        min_side: int | None,
        buckets: str | Sequence[str] | None = None,
    ) -> None:
        self.decoding: dict[str, Any] = {  # the key contains it: keep names and order
            "size": check_int("image_size", image_size),
            "crop": check_choice("crop", crop, get_args(Crop)),
            "background": check_colour("background", background),
            "max_pixels": check_int("max_pixels", max_pixels),
        }
        if image_size * image_size > max_pixels:
            raise ValueError(
                f"image_size={image_size} makes images of more than max_pixels={max_pixels:,}"
            )
        if min_side is not None:
            self.decoding["min_side"] = check_int("min_side", min_side)
        if buckets is not None:
            if crop != "center":
                raise ValueError(
                    f"crop={crop} does not go with buckets, which cut each image once: use "
                    f"crop=center"
                )
            self.decoding["buckets"] = parse_buckets(buckets, image_size)
        self.scaled_up: set[int] = set()
        self.deep: set[int] = set()
        self.cut: dict[int, float] = {}

    @abstractmethod
    def read(self, index: int, limit: int) -> bytes:
        """Return the bytes of the image's file, of at most ``limit`` bytes.

        Raises:
            BadImageError: it cannot be read.
        """

    def decode(self, index: int) -> np.ndarray:
        """Return the image, uint8 ``(3, h, w)``.

        Raises:
            BadImageError: it cannot be used.
        """
        image = decode_file(self.content(index), **self.decoding)
        if image.is_scaled_up:
            self.scaled_up.add(index)
        if "buckets" in self.decoding:
            self.cut[index] = image.cut
        if image.is_deep:
            self.deep.add(index)
        return image.pixels

    def content(self, index: int) -> bytes:
        """Return the bytes of the image's file.

        Raises:
            BadImageError: it cannot be read.
        """
        return self.read(index, max_bytes(self.decoding["max_pixels"]))
