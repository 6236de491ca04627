"""Which positions a batch has, and which image falls at which: a keyed permutation for every virtual epoch.

    index(p) = permutation[seed, p // n](p % n)

The permutation is a Feistel network on the smallest even number of bits that holds ``n``, walked along its cycles
until it lands below ``n`` (Black & Rogaway 2002). It is computed, not stored: O(1) time and memory a position, at
a billion images as at ten. There is no padding and no dropped tail, and a batch may span two epochs.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from itertools import count

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Sampler

from sturdy.randomness import key

ROUNDS = 6


class Order:
    """The order of ``n`` images under ``seed``.

    Args:
        n: number of images, at least 1.
        seed: key of the order; ``purpose`` tells apart orders of the same run.
    """

    def __init__(self, n: int, seed: int, *, purpose: str = "order") -> None:
        if n < 1:
            raise ValueError(f"an order needs at least one image, not {n}")
        self.n, self.seed, self.purpose = n, seed, purpose
        self.half = max(1, ((n - 1).bit_length() + 1) // 2)  # bits in each half of the network

    def __call__(self, positions: ArrayLike) -> NDArray[np.int64]:
        """The image's index in [0, n) at each global position, ``(b,) -> (b,)``; positions count from 0."""
        epochs, offsets = np.divmod(np.asarray(positions, dtype=np.int64), self.n)
        indices = np.empty_like(offsets)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = self._permute(offsets[here].astype(np.uint64), int(epoch))
        return indices

    def _permute(self, x: NDArray[np.uint64], epoch: int) -> NDArray[np.uint64]:
        keys = _round_keys(self.seed, self.purpose, epoch)
        x = self._feistel(x, keys)
        while (outside := x >= self.n).any():  # at most 4 n values for n images: about four walks at worst
            x[outside] = self._feistel(x[outside], keys)
        return x

    def _feistel(self, x: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        bits, mask = np.uint64(self.half), np.uint64((1 << self.half) - 1)
        left, right = x >> bits, x & mask
        for k in keys:
            left, right = right, left ^ (_mix(right ^ k) & mask)
        return (left << bits) | right


@lru_cache(maxsize=64)
def _round_keys(seed: int, purpose: str, epoch: int) -> NDArray[np.uint64]:
    return np.array([key(seed, purpose, epoch, i) for i in range(ROUNDS)], dtype=np.uint64)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea & Flood 2014): every bit in, every bit out."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


Places = Callable[[NDArray[np.int64]], NDArray[np.int64]]  # an index in [0, n) at each place


class Split:
    """All images in one order, those held out first; which these are depends on no seed.

    By count, the order is a permutation of the ``n`` images: one image more, and most of those held out are others.
    By content, the order is that of a number in [0, 1) which each image has from a hash of its content, and those
    whose number lies in a fixed interval are held out: no image changes sides when others come, go or are renamed.

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
        return cls(Order(n, 0, purpose="split"), n, range(min(max(1, round(n * share)), n - 1)))

    @classmethod
    def fold(cls, n: int, number: int, folds: int) -> "Split":
        """Hold out part ``number``, from 1 on, of ``folds`` parts by count, whose sizes differ by one at most.

        Raises:
            ValueError: if some would be empty.
        """
        if folds > n:
            raise ValueError(f"data.folds={folds} cannot be made of {n} images; use at most {n}")
        part = range(n * (number - 1) // folds, n * number // folds)
        return cls(Order(n, 0, purpose="split"), n, part)

    @classmethod
    def content_share(cls, contents: NDArray[np.uint64], share: float) -> "Split":
        """Hold out the images whose number is below ``share``, but at least that of the smallest, and not all.

        Args:
            contents: a hash of each image, ``(n,)``. Equal ones fall on the same side, unless all are equal.
        """
        order, numbers = _by_content(contents)
        least = np.searchsorted(numbers, numbers[0], side="right")
        most = np.searchsorted(numbers, numbers[-1], side="left")
        n = max(1, min(max(np.searchsorted(numbers, share), least), most))
        return cls(order, len(contents), range(int(n)))

    @classmethod
    def content_fold(cls, contents: NDArray[np.uint64], number: int, folds: int) -> "Split":
        """Hold out the images whose number is in [(number - 1) / folds, number / folds); arguments as above.

        Raises:
            ValueError: if these are none, or all.
        """
        order, numbers = _by_content(contents)
        first, end = np.searchsorted(numbers, [(number - 1) / folds, number / folds]).tolist()
        if (size := end - first) in (0, len(contents)):
            raise ValueError(
                f"data.fold={number} of data.folds={folds} would hold out {size} of {len(contents)} images, as their "
                f"contents decide: use fewer folds, or data.split=count for equal ones"
            )
        return cls(order, len(contents), range(first, end))

    def __call__(self, places: ArrayLike) -> NDArray[np.int64]:
        """The image's index in [0, n) at each of the places, ``(b,) -> (b,)``."""
        return self.order((self.held_out.start + np.asarray(places, dtype=np.int64)) % self.n)


def _by_content(contents: NDArray[np.uint64]) -> tuple[Places, NDArray[np.float64]]:
    """The order of the images by their numbers in [0, 1), and these numbers in that order, ``(n,)``."""
    order = np.argsort(contents, kind="stable")
    numbers = (contents[order] >> np.uint64(11)).astype(np.float64) * 2.0**-53  # as many bits as float64 has below 1
    return partial(np.take, order), numbers


class Balanced:
    """An order in which classes come as often as is wanted: class k at the share (1 - balance) n_k / n + balance / K.

    Every virtual epoch has the same number of each class, its rank by rank:

        k, rank(p) = the class and the place in it of slot permutation[seed, p // m](p % m),    m slots an epoch
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
        wanted = ((1 - balance) * sizes / n + balance / k) * (k * -(-n // k))  # a multiple of k, so that 1 is exact
        self.counts = _rounded(wanted)
        self.ends = np.cumsum(self.counts)
        self.slots = Order(int(self.ends[-1]), seed, purpose="classes")
        self.orders = [Order(int(size), seed, purpose=f"class {name}") for name, size in zip(names, sizes, strict=True)]

    def __call__(self, positions: ArrayLike) -> NDArray[np.int64]:
        """The image's index in [0, n) at each global position, ``(b,) -> (b,)``."""
        positions = np.asarray(positions, dtype=np.int64)
        slots = self.slots(positions)
        classes = np.searchsorted(self.ends, slots, side="right")
        ranks = positions // self.slots.n * self.counts[classes] + slots - (self.ends - self.counts)[classes]
        indices = np.empty_like(positions)
        for k in np.unique(classes):
            here = classes == k
            indices[here] = self.images[self.starts[k] + self.orders[k](ranks[here])]
        return indices


def _rounded(wanted: NDArray[np.float64]) -> NDArray[np.int64]:
    """Whole numbers of the same sum, none further off than 1: the largest remainders are rounded up."""
    whole = np.floor(wanted + 1e-9).astype(np.int64)
    short = round(wanted.sum()) - whole.sum()
    whole[np.argsort(whole - wanted, kind="stable")[:short]] += 1
    return whole


class Endless(Sampler[NDArray[np.int64]]):
    """Positions of batch after batch, without an end.

    Args:
        start: the first position, where ``step`` steps are done.
        skips: batches to leave out, as ``(steps done before, first position, size)``; one that does not come by
            like this is of another branch of the run, and changes nothing.
        part: what of each batch this process computes.
    """

    def __init__(
        self,
        start: int,
        batch_size: int,
        step: int = 0,
        skips: Iterable[tuple[int, int, int]] = (),
        part: slice = slice(None),
    ) -> None:
        self.start, self.batch_size, self.step, self.part = start, batch_size, step, part
        self.left_out: list[tuple[int, int]] = []
        for at, position, size in sorted(skips):
            if at >= step and position == self.first(at):
                self.left_out.append((at, size))

    def first(self, step: int) -> int:
        """The first position of the batch that is taken after ``step`` steps."""
        left_out = sum(size for at, size in self.left_out if at <= step)
        return self.start + (step - self.step) * self.batch_size + left_out

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        for step in count(self.step):
            first = self.first(step)
            yield np.arange(first, first + self.batch_size)[self.part]
