"""Which images are held out, and how often each class comes in training."""

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import ArrayLike, NDArray

from exact_resume.permutation import FeistelPermutation

Order = Callable[[NDArray[np.int64]], NDArray[np.int64]]
"""A function from places in an order to indices of images, ``(b,) -> (b,)``."""


class Split:
    """An order of all images in which the held-out images come first; it depends on no seed.

    By count, the order is a permutation of the ``n`` images. Another number of images is another
    permutation, and most of the held-out images are then others.

    By content, each image has a number in [0, 1) from a hash of its content, and the order is that
    of these numbers. The held-out images are those whose number lies in a fixed interval, so that
    no image changes sides when others are added, removed or renamed.

    Args:
        order: gives the index in [0, n) of the image at each place.
        n: number of images.
        held_out: the places of the held-out images.
    """

    def __init__(self, order: Order, n: int, held_out: range) -> None:
        self.order = order
        self.n = n
        self.held_out = held_out

    def indices(self, places: ArrayLike) -> NDArray[np.int64]:
        """Return the index in [0, n) of the image at each place, ``(b,) -> (b,)``.

        Places ``0`` to ``len(held_out) - 1`` are those of the held-out images, the others those of
        the training images.
        """
        return self.order((self.held_out.start + np.asarray(places, dtype=np.int64)) % self.n)

    @classmethod
    def by_count(cls, n: int, fraction: float) -> "Split":
        """Hold out this fraction of ``n`` images, but at least one image and not all of them."""
        held_out = min(max(1, round(n * fraction)), n - 1)
        return cls(_permutation(n), n, range(held_out))

    @classmethod
    def fold_by_count(cls, n: int, fold: int, folds: int) -> "Split":
        """Hold out part ``fold``, counted from 1, of ``folds`` parts of nearly equal size.

        Raises:
            ValueError: some parts would be empty.
        """
        if folds > n:
            raise ValueError(f"folds={folds} cannot be made of {n} images; use at most {n}")
        return cls(_permutation(n), n, range(n * (fold - 1) // folds, n * fold // folds))

    @classmethod
    def by_content(cls, hashes: NDArray[np.uint64], fraction: float) -> "Split":
        """Hold out the images whose number is below ``fraction``.

        At least the image with the smallest number is held out, and the one with the largest is
        not.

        Args:
            hashes: a hash of the content of each image, ``(n,)``. Images with equal hashes fall on
                the same side, unless all are equal.
            fraction: about this fraction of the images is held out.
        """
        order, numbers = _order_by_content(hashes)
        smallest = np.searchsorted(numbers, numbers[0], side="right")
        all_but_largest = np.searchsorted(numbers, numbers[-1], side="left")
        below = np.searchsorted(numbers, fraction)
        held_out = max(1, min(max(below, smallest), all_but_largest))
        return cls(order, len(hashes), range(int(held_out)))

    @classmethod
    def fold_by_content(cls, hashes: NDArray[np.uint64], fold: int, folds: int) -> "Split":
        """Hold out the images whose number is in [(fold - 1) / folds, fold / folds).

        Raises:
            ValueError: this would be no image, or all of them.
        """
        order, numbers = _order_by_content(hashes)
        first, end = np.searchsorted(numbers, [(fold - 1) / folds, fold / folds]).tolist()
        held_out = range(first, end)
        if len(held_out) in (0, len(hashes)):
            raise ValueError(
                f"fold={fold} of folds={folds} would hold out {len(held_out)} of {len(hashes)} "
                f"images, as their contents decide: use fewer folds, or split=count for equal ones"
            )
        return cls(order, len(hashes), held_out)


def split_images(
    n: int,
    hashes: NDArray[np.uint64] | None,
    *,
    split: str,
    holdout: float,
    fold: int | None,
    folds: int | None,
) -> Split:
    """Split ``n`` images as ``ImageData`` does; the arguments are its own.

    Args:
        n: number of images.
        hashes: a hash of the content of each, ``(n,)``; a split by count needs none.
        split: ``"content"`` or ``"count"``.
        holdout: the fraction that is held out.
        fold: instead of this fraction, the part that is held out, counted from 1.
        folds: number of parts.

    Raises:
        ValueError: the parts would be empty, or there are no hashes.
    """
    if split == "count":
        if fold and folds:
            return Split.fold_by_count(n, fold, folds)
        return Split.by_count(n, holdout)
    if hashes is None:
        raise ValueError("the images have no hashes of their contents, which split=content needs")
    if fold and folds:
        return Split.fold_by_content(hashes, fold, folds)
    return Split.by_content(hashes, holdout)


def _permutation(n: int) -> FeistelPermutation:
    return FeistelPermutation(n, 0, purpose="split")


def _order_by_content(hashes: NDArray[np.uint64]) -> tuple[Order, NDArray[np.float64]]:
    """Return the order of the images by their numbers, and the sorted numbers, ``(n,)``."""
    order = np.argsort(hashes, kind="stable")
    high_bits = hashes[order] >> np.uint64(11)  # as many bits as float64 has below 1
    return partial(np.take, order), high_bits.astype(np.float64) * 2.0**-53


class BalancedPermutation:
    """An order of the training images with a chosen frequency of each class.

    Class k, with n_k of the n images, comes with the frequency (1 - balance) n_k / n + balance / K.
    Every virtual epoch has m places and the same number m_k of each class:

        (k, rank) = class and rank of slot permutation[seed, p // m](p % m)
        index(p)  = images of k[permutation[seed, k](m_k (p // m) + rank)]

    Args:
        labels: of the ``n`` images, ``(n,)``. Classes without an image do not count.
        seed: key of the order.
        balance: from 0, as frequent as in the data, to 1, all classes equally frequent.
    """

    def __init__(self, labels: NDArray[np.int64], seed: int, *, balance: float) -> None:
        names, classes, sizes = np.unique(labels, return_inverse=True, return_counts=True)
        n = len(labels)
        k = len(names)
        self.images = np.argsort(classes, kind="stable")  # class after class
        self.starts = np.cumsum(sizes) - sizes
        places = k * -(-n // k)  # n rounded up to a multiple of k, so that balance=1 is exact
        self.counts = _round_keeping_sum(((1 - balance) * sizes / n + balance / k) * places)
        self.ends = np.cumsum(self.counts)
        self.slots = FeistelPermutation(int(self.ends[-1]), seed, purpose="classes")
        self.orders = [
            FeistelPermutation(int(size), seed, purpose=f"class {name}")
            for name, size in zip(names, sizes, strict=True)
        ]

    def __call__(self, positions: ArrayLike) -> NDArray[np.int64]:
        """Return the index in [0, n) of the image at each global position, ``(b,) -> (b,)``."""
        positions = np.asarray(positions, dtype=np.int64)
        slots = self.slots(positions)
        classes = np.searchsorted(self.ends, slots, side="right")
        epochs = positions // self.slots.n
        ranks_in_epoch = slots - (self.ends - self.counts)[classes]
        ranks = epochs * self.counts[classes] + ranks_in_epoch
        indices = np.empty_like(positions)
        for k in np.unique(classes):
            of_class = classes == k
            indices[of_class] = self.images[self.starts[k] + self.orders[k](ranks[of_class])]
        return indices


def _round_keeping_sum(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Round to whole numbers of the same sum; the largest remainders are rounded up."""
    rounded = np.floor(values + 1e-9).astype(np.int64)
    missing = round(values.sum()) - rounded.sum()
    rounded[np.argsort(rounded - values, kind="stable")[:missing]] += 1
    return rounded
