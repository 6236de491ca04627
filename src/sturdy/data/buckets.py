"""Buckets: images of several sizes, in batches of one size each.

    bucket of batch k = the bucket of the image at place k of an order of all n images
    images of batch k = places [r B, (r + 1) B) of this bucket's own order
    r = number of earlier batches of this bucket

Orders have no end (``exact_resume.permutation``). In n batches, a bucket of m images has m batches
of B images, so that each of its images comes exactly B times. No image is dropped and no bucket
joined with another. A bucket of fewer than B images repeats them within a batch.

All of it is a function of (seed, position). The number r is looked up in a table of the n batches
around k, which takes as long as to go through the n images once and does not depend on k.
"""

import re
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from exact_resume.permutation import FeistelPermutation

Size = tuple[int, int]
"""Height and width, in pixels."""

RATIOS = (1, 4 / 3, 3 / 2, 16 / 9, 2.4, 4)  # of the long to the short side, for buckets=auto
PARTS = 8  # of image_size, at least: of so many units a side of a bucket is made


def parse_size(name: str, value: Any) -> Size:
    """Return height and width of a text such as ``48x80``.

    Raises:
        ValueError: it is no such text; the message begins with the argument's ``name``.
    """
    found = re.fullmatch(r"(\d+)x(\d+)", str(value))
    height, width = map(int, found.groups()) if found else (0, 0)
    if not height or not width:
        raise ValueError(f"{name}={value} must be height x width in pixels, such as 48x80")
    return height, width


def parse_buckets(buckets: str | Sequence[str], image_size: int) -> list[Size]:
    """Return the sizes of ``buckets``: a list of texts such as ``48x80``, or ``auto``.

    ``auto`` gives the common ratios of photographs, upright and across, each with about the area of
    ``image_size`` squared. The sides are multiples of the largest power of two that is at most an
    eighth of ``image_size``.

    Raises:
        ValueError: a text is not such a size, or ``image_size`` cannot be divided so.
    """
    if buckets != "auto":
        is_one = isinstance(buckets, str) or not isinstance(buckets, Iterable)
        sizes = [parse_size("buckets", text) for text in ([buckets] if is_one else buckets)]
        if not sizes:
            raise ValueError("buckets=[] has no size: give some, such as [64x64,48x80], or auto")
        return list(dict.fromkeys(sizes))
    unit = 1 << (max(1, image_size // PARTS).bit_length() - 1)
    if image_size < PARTS or image_size % unit:
        below = max(PARTS, image_size // unit * unit)
        raise ValueError(
            f"image_size={image_size} cannot be divided evenly for buckets=auto: choose {below} or "
            f"{below + unit}, or give the buckets as buckets=[64x64,48x80]"
        )
    found: list[Size] = []
    for ratio in RATIOS:
        short, long = (
            round(image_size * factor / unit) * unit for factor in (ratio**-0.5, ratio**0.5)
        )
        found += [(short, long), (long, short)]
    return list(dict.fromkeys(found))


def nearest_bucket(height: int, width: int, buckets: Sequence[Size]) -> Size:
    """Return the bucket whose ratio of sides is nearest, by its logarithm; the first of several."""

    def distance(bucket: Size) -> Fraction:
        """Return exp |log(height / width) - log(bucket's)|, exactly."""
        products = (height * bucket[1], width * bucket[0])
        return Fraction(max(products), min(products))

    return min(buckets, key=distance)


class BucketOrder:
    """The order of images in batches of one size: the equations of this file.

    The order of a bucket depends on the seed and on its size, so that other buckets do not change
    it.

    Args:
        sizes: height and width of each of the ``n`` images, ``(n, 2)``.
        seed: key of the order.
        batch_size: B. Batch k has the positions [k B, (k + 1) B).

    Attributes:
        counts: the number of images of each size.
    """

    def __init__(self, sizes: NDArray[np.int64], seed: int, *, batch_size: int) -> None:
        distinct, buckets, counts = np.unique(
            sizes, axis=0, return_inverse=True, return_counts=True
        )
        self.buckets = buckets.reshape(-1)  # (n,): of each image
        self.sizes: list[Size] = [(int(height), int(width)) for height, width in distinct]
        self.counts: dict[Size, int] = dict(zip(self.sizes, counts.tolist(), strict=True))
        self.totals = counts
        self.starts = np.cumsum(counts) - counts
        self.images = np.argsort(self.buckets, kind="stable")  # bucket after bucket
        self.batch_size = batch_size
        self.batches = FeistelPermutation(len(sizes), seed, purpose="buckets")
        self.orders = [
            FeistelPermutation(count, seed, purpose=f"bucket {height}x{width}")
            for (height, width), count in self.counts.items()
        ]
        self.epoch = -1  # whose table is kept
        self.table = (self.buckets, self.buckets)

    def __call__(self, positions: ArrayLike) -> NDArray[np.int64]:
        """Return the index in [0, n) of the image at each global position, ``(b,) -> (b,)``."""
        positions = np.asarray(positions, dtype=np.int64)
        batches, places = np.divmod(positions, self.batch_size)
        indices = np.empty_like(positions)
        for batch in np.unique(batches):
            bucket, rank = self.rank(int(batch))
            chosen = batches == batch
            order = self.orders[bucket](rank * self.batch_size + places[chosen])
            indices[chosen] = self.images[self.starts[bucket] + order]
        return indices

    def rank(self, batch: int) -> tuple[int, int]:
        """Return the bucket of a batch, and the number of earlier batches of this bucket."""
        epoch, place = divmod(batch, self.batches.n)
        if epoch != self.epoch:
            self.table = self._ranks_in_epoch(epoch)
            self.epoch = epoch
        bucket, rank = (int(column[place]) for column in self.table)
        return bucket, epoch * int(self.totals[bucket]) + rank

    def _ranks_in_epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the bucket of each batch of an epoch, and its rank there, ``(n,)`` each."""
        n = self.batches.n
        buckets = self.buckets[self.batches(np.arange(epoch * n, (epoch + 1) * n))]
        ranks = np.empty(n, dtype=np.int64)
        ranks[np.argsort(buckets, kind="stable")] = np.arange(n)
        return buckets, ranks - self.starts[buckets]


def batches_of_one_size(
    sizes: NDArray[np.int64], batch_size: int, *, end: int
) -> list[NDArray[np.int64]]:
    """Return the places of the first ``end`` images in batches of one size, each place once.

    Args:
        sizes: height and width of each image, ``(n, 2)``.
        batch_size: most images of a batch.
        end: number of images.
    """
    _, buckets = np.unique(sizes[:end], axis=0, return_inverse=True)
    buckets = buckets.reshape(-1)
    batches = []
    for bucket in range(buckets.max() + 1):
        places = np.flatnonzero(buckets == bucket)
        batches += [places[i : i + batch_size] for i in range(0, len(places), batch_size)]
    return batches


# --- What the user is told


def size_text(size: Sequence[int]) -> str:
    """Return a size as it is typed, such as ``48x80``."""
    return f"{size[0]}x{size[1]}"


def describe_buckets(order: BucketOrder, held_out: NDArray[np.int64]) -> list[str]:
    """Say how many images each bucket has, and which are smaller than a batch.

    Args:
        order: of the training images.
        held_out: height and width of each held-out image, ``(m, 2)``.
    """
    found: dict[Size, int] = {}
    for height, width in held_out.tolist():
        found[height, width] = found.get((height, width), 0) + 1
    sizes = sorted(order.counts.keys() | found.keys())
    parts = [
        f"{size_text(size)} ({order.counts.get(size, 0):,} + {found.get(size, 0):,})"
        for size in sizes
    ]
    lines = [f"buckets, height x width (images to train on + held out): {', '.join(parts)}"]
    small = [
        f"{size_text(size)} ({count})"
        for size, count in order.counts.items()
        if count < order.batch_size
    ]
    if small:
        lines.append(
            f"buckets of fewer images than batch_size={order.batch_size}: {', '.join(small)}; a "
            f"batch of theirs has some images several times, and no image comes more often than "
            f"others"
        )
    return lines


def describe_cut(cut: dict[Size, list[float]]) -> list[str]:
    """Say which share of an image was cut off on average, in each bucket.

    Args:
        cut: the shares of the images of each size.
    """
    if not cut:
        return []
    shares = [share for of_size in cut.values() for share in of_size]
    parts = [f"{size_text(size)} {np.mean(of_size):.1%}" for size, of_size in sorted(cut.items())]
    return [
        f"cut off to fit the buckets: {np.mean(shares):.1%} of an image on average "
        f"({', '.join(parts)})"
    ]
