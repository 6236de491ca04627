"""What is odd about images that are whole, in a line each: of one colour, scaled up, copies of
others, left out.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sturdy.data.source import Source

NARROW = 24  # of 256 values: 12 of 16 bits have 16, and a resize goes a little beyond them


def hashed(*parts: bytes | memoryview) -> int:
    """Hash ``parts`` to 64 bits."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return int.from_bytes(digest.digest(), "little")


def hashed_pixels(image: np.ndarray) -> int:
    """Hash the shape and the pixels of ``image``, contiguous uint8 ``(3, h, w)``, to 64 bits.

    Of a million images, two that differ have the same hash with a probability of 3e-8.
    """
    return hashed(np.array(image.shape, dtype="<i8").tobytes(), image.data)


class Look(NamedTuple):
    """What is remembered of an image: a hash of its pixels, its short side, whether it is nearly of
    one colour.
    """

    hash: int
    side: int
    plain: bool


def look_at(image: np.ndarray) -> Look:
    """Look at an image, uint8 ``(3, h, w)``."""
    plain = np.ptp(image, axis=(1, 2)).max() < NARROW
    return Look(hashed_pixels(image), min(image.shape[1:]), bool(plain))


def remarks(
    source: Source, kept: Sequence[int], looks: Sequence[Look], small: Sequence[int]
) -> list[str]:
    """Lines for a user, none where nothing is odd.

    Args:
        source: with all of its images decoded.
        kept: indices of the images in the cache.
        looks: one for each of them.
        small: indices of images left out as too small.
    """
    lines = []

    def add(what: str, names: Sequence[str], all: int, more: str = "") -> None:
        first = ", ".join(names[:3]) + ", ..." * (len(names) > 3)
        if names:
            lines.append(f"{what}: {len(names):,} of {all:,} images ({first}){more}")

    add("smaller than data.min_side, left out", [source.name(i) for i in small], len(source))
    scaled: set[int] = getattr(source, "scaled_up", set()).intersection(kept)
    side = min((look.side for look in looks), default=0)
    remedy = f"; data.min_side={side} leaves them out"
    add(
        "smaller than data.image_size, scaled up",
        [source.name(i) for i in sorted(scaled)],
        len(kept),
        remedy,
    )

    plain = [index for index, look in zip(kept, looks, strict=True) if look.plain]
    deep: set[int] = getattr(source, "deep", set()).intersection(plain)
    remedy = f"; {len(deep):,} of them have more than 8 bits but use few of the values: multiply these in the files, "
    remedy = f"{remedy}by 16 where 12 bits are stored in 16" if deep else ""
    add("nearly of one colour", [source.name(i) for i in plain], len(kept), remedy)

    copies = [(kept[i], kept[k]) for i, k in _copies(looks)]
    other = sum(source.label(i) != source.label(k) for i, k in copies)
    remedy = f"; {other:,} of them are in another class" if other else ""
    add(
        "exact copies",
        [f"{source.name(i)} = {source.name(k)}" for i, k in copies],
        len(kept),
        remedy,
    )
    return lines


def _copies(looks: Sequence[Look]) -> np.ndarray:
    """Pairs ``(n, 2)`` of images whose pixels are equal: each copy and the first of them."""
    hashes = np.array([look.hash for look in looks], dtype=np.uint64)
    _, first, which = np.unique(hashes, return_index=True, return_inverse=True)
    pairs = np.stack([np.arange(len(looks)), first[which]], axis=1)
    return pairs[pairs[:, 0] != pairs[:, 1]]
