"""Which positions a batch has, and which image falls at which: a keyed permutation for every
virtual epoch.

    index(p) = permutation[seed, p // n](p % n)

The permutation is a Feistel network on the smallest even number of bits that holds ``n``, walked
along its cycles until it lands below ``n`` (Black & Rogaway 2002). It is computed, not stored: O(1)
time and memory a position, at a billion images as at ten. There is no padding and no dropped tail,
and a batch may span two epochs.
"""

from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import count

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Sampler

from exact_resume.randomness import key

ROUNDS = 6


class FeistelPermutation:
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
        """The image's index in [0, n) at each global position, ``(b,) -> (b,)``; positions count
        from 0.
        """
        epochs, offsets = np.divmod(np.asarray(positions, dtype=np.int64), self.n)
        indices = np.empty_like(offsets)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = self._permute(offsets[here].astype(np.uint64), int(epoch))
        return indices

    def _permute(self, x: NDArray[np.uint64], epoch: int) -> NDArray[np.uint64]:
        keys = _round_keys(self.seed, self.purpose, epoch)
        x = self._feistel(x, keys)
        while (
            outside := x >= self.n
        ).any():  # at most 4 n values for n images: about four walks at worst
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


class InfiniteBatchSampler(Sampler[NDArray[np.int64]]):
    """Positions of batch after batch, without an end.

    Args:
        start: the first position, where ``step`` steps are done.
        skips: batches to leave out, as ``(steps done before, first position, size)``; one that does
            not come by like this is of another branch of the run, and changes nothing.
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
