"""Which images are held out, and how often each class comes in training."""

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import ArrayLike, NDArray

from exact_resume.permutation import FeistelPermutation

Places = Callable[[NDArray[np.int64]], NDArray[np.int64]]  # an index in [0, n) at each place


class Split:
    """All images in one order, those held out first; which these are depends on no seed.

    By count, the order is a permutation of the ``n`` images: one image more, and most of those held
        out are others.
    By content, the order is that of a number in [0, 1) which each image has from a hash of its
    content, and those
    whose number lies in a fixed interval are held out: no image changes sides when others come, go
        or are renamed.

    Args:
        order: the image's index in [0, n) at each place, ``(b,) -> (b,)``.
        n: number of images.
        held_out: where those held out are in that order.
    """

    def __init__(self, order: Places, n: int, held_out: range) -> None:
        self.order, self.n, self.held_out = order, n, held_out

    @classmethod
    def share(cls, n: int, share: float) -> "Split":
        """Hold out that ``share`` by count, but at least one image, and not all."""
        return cls(
            FeistelPermutation(n, 0, purpose="split"),
            n,
            range(min(max(1, round(n * share)), n - 1)),
        )

    @classmethod
    def fold(cls, n: int, number: int, folds: int) -> "Split":
        """Hold out part ``number``, from 1 on, of ``folds`` parts by count, whose sizes differ by
        one at most.

        Raises:
            ValueError: if some would be empty.
        """
        if folds > n:
            raise ValueError(f"data.folds={folds} cannot be made of {n} images; use at most {n}")
        part = range(n * (number - 1) // folds, n * number // folds)
        return cls(FeistelPermutation(n, 0, purpose="split"), n, part)

    @classmethod
    def content_share(cls, contents: NDArray[np.uint64], share: float) -> "Split":
        """Hold out the images whose number is below ``share``, but at least that of the smallest,
        and not all.

        Args:
            contents: a hash of each image, ``(n,)``. Equal ones fall on the same side, unless all
                are equal.
        """
        order, numbers = _by_content(contents)
        least = np.searchsorted(numbers, numbers[0], side="right")
        most = np.searchsorted(numbers, numbers[-1], side="left")
        n = max(1, min(max(np.searchsorted(numbers, share), least), most))
        return cls(order, len(contents), range(int(n)))

    @classmethod
    def content_fold(cls, contents: NDArray[np.uint64], number: int, folds: int) -> "Split":
        """Hold out the images whose number is in [(number - 1) / folds, number / folds); arguments
        as above.

        Raises:
            ValueError: if these are none, or all.
        """
        order, numbers = _by_content(contents)
        first, end = np.searchsorted(numbers, [(number - 1) / folds, number / folds]).tolist()
        if (size := end - first) in (0, len(contents)):
            raise ValueError(
                f"data.fold={number} of data.folds={folds} would hold out {size} of "
                f"{len(contents)} images, as their "
                f"contents decide: use fewer folds, or data.split=count for equal ones"
            )
        return cls(order, len(contents), range(first, end))

    def __call__(self, places: ArrayLike) -> NDArray[np.int64]:
        """The image's index in [0, n) at each of the places, ``(b,) -> (b,)``."""
        return self.order((self.held_out.start + np.asarray(places, dtype=np.int64)) % self.n)


def _by_content(contents: NDArray[np.uint64]) -> tuple[Places, NDArray[np.float64]]:
    """The order of the images by their numbers in [0, 1), and these numbers in that order,
    ``(n,)``.
    """
    order = np.argsort(contents, kind="stable")
    numbers = (contents[order] >> np.uint64(11)).astype(
        np.float64
    ) * 2.0**-53  # as many bits as float64 has below 1
    return partial(np.take, order), numbers


class BalancedPermutation:
    """An order in which classes come as often as is wanted: class k at the share (1 - balance) n_k
    / n + balance / K.

    Every virtual epoch has the same number of each class, its rank by rank:

        k, rank(p) = the class and the place in it of slot permutation[seed, p // m](p % m),    m
        slots an epoch
        index(p)   = images of k[permutation[seed, k](count of k before this epoch + rank)]

    Args:
        labels: of the ``n`` images, ``(n,)``; classes without an image are none.
        balance: from 0, as often as they are, to 1, all equally often.
    """

    def __init__(self, labels: NDArray[np.int64], seed: int, *, balance: float) -> None:
        names, classes, sizes = np.unique(labels, return_inverse=True, return_counts=True)
        n, k = len(labels), len(names)
        self.images = np.argsort(classes, kind="stable")  # class after class
        self.starts = np.cumsum(sizes) - sizes
        wanted = ((1 - balance) * sizes / n + balance / k) * (
            k * -(-n // k)
        )  # a multiple of k, so that 1 is exact
        self.counts = _rounded(wanted)
        self.ends = np.cumsum(self.counts)
        self.slots = FeistelPermutation(int(self.ends[-1]), seed, purpose="classes")
        self.orders = [
            FeistelPermutation(int(size), seed, purpose=f"class {name}")
            for name, size in zip(names, sizes, strict=True)
        ]

    def __call__(self, positions: ArrayLike) -> NDArray[np.int64]:
        """The image's index in [0, n) at each global position, ``(b,) -> (b,)``."""
        positions = np.asarray(positions, dtype=np.int64)
        slots = self.slots(positions)
        classes = np.searchsorted(self.ends, slots, side="right")
        ranks = (
            positions // self.slots.n * self.counts[classes]
            + slots
            - (self.ends - self.counts)[classes]
        )
        indices = np.empty_like(positions)
        for k in np.unique(classes):
            here = classes == k
            indices[here] = self.images[self.starts[k] + self.orders[k](ranks[here])]
        return indices


def _rounded(wanted: NDArray[np.float64]) -> NDArray[np.int64]:
    """Whole numbers of the same sum, none further off than 1: the largest remainders are rounded
    up.
    """
    whole = np.floor(wanted + 1e-9).astype(np.int64)
    short = round(wanted.sum()) - whole.sum()
    whole[np.argsort(whole - wanted, kind="stable")[:short]] += 1
    return whole
