"""Which sample falls at which position: a keyed permutation for every virtual epoch.

    index(p) = permutation[seed, p // n](p % n)

The permutation is a Feistel network on the smallest even number of bits that holds n. It is walked
along its cycles until it lands below n (Black & Rogaway 2002). It is computed and not stored: a
position takes O(1) time and memory, with a billion samples as with ten. There is no padding and no
dropped tail, and a batch may span two epochs.
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
    """The order of ``n`` samples under ``seed``.

    Args:
        n: number of samples, at least 1.
        seed: key of the order.
        purpose: tells apart several orders of one run.
    """

    def __init__(self, n: int, seed: int, *, purpose: str = "order") -> None:
        if n < 1:
            raise ValueError(f"n={n} must be at least one sample")
        self.n = n
        self.seed = seed
        self.purpose = purpose
        self.half_bits = max(1, ((n - 1).bit_length() + 1) // 2)  # in each half of the network

    def __call__(self, positions: ArrayLike) -> NDArray[np.int64]:
        """Return the index in [0, n) at each global position, ``(b,) -> (b,)``."""
        epochs, offsets = np.divmod(np.asarray(positions, dtype=np.int64), self.n)
        indices = np.empty_like(offsets)
        for epoch in np.unique(epochs):
            in_epoch = epochs == epoch
            indices[in_epoch] = self._permute(offsets[in_epoch].astype(np.uint64), int(epoch))
        return indices

    def _permute(self, x: NDArray[np.uint64], epoch: int) -> NDArray[np.uint64]:
        keys = _round_keys(self.seed, self.purpose, epoch)
        x = self._feistel(x, keys)
        # The network has at most 4 n values, so that the walk takes about four steps at worst.
        while (outside := x >= self.n).any():
            x[outside] = self._feistel(x[outside], keys)
        return x

    def _feistel(self, x: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        bits = np.uint64(self.half_bits)
        mask = np.uint64((1 << self.half_bits) - 1)
        left = x >> bits
        right = x & mask
        for k in keys:
            left, right = right, left ^ (_mix(right ^ k) & mask)
        return (left << bits) | right


class InfiniteBatchSampler(Sampler[NDArray[np.int64]]):
    """Yields the positions of batch after batch, without an end.

    Args:
        start: the first position, after ``step`` steps.
        batch_size: positions of a batch.
        step: number of steps done.
        skips: batches to leave out, as (steps done before, first position, size). An entry whose
            position does not match belongs to an abandoned branch of the run and is ignored.
        part: the part of each batch that this process computes; a slice or indices.
    """

    def __init__(
        self,
        start: int,
        batch_size: int,
        step: int = 0,
        skips: Iterable[tuple[int, int, int]] = (),
        part: slice | NDArray[np.int64] = slice(None),
    ) -> None:
        self.start = start
        self.batch_size = batch_size
        self.step = step
        self.part = part
        self.skipped: list[tuple[int, int]] = []  # (steps done before, size)
        for steps_before, position, size in sorted(skips):
            if steps_before >= step and position == self.first(steps_before):
                self.skipped.append((steps_before, size))

    def first(self, step: int) -> int:
        """Return the first position of the batch that follows ``step`` steps."""
        skipped = sum(size for steps_before, size in self.skipped if steps_before <= step)
        return self.start + (step - self.step) * self.batch_size + skipped

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        for step in count(self.step):
            first = self.first(step)
            yield np.arange(first, first + self.batch_size)[self.part]


@lru_cache(maxsize=64)
def _round_keys(seed: int, purpose: str, epoch: int) -> NDArray[np.uint64]:
    return np.array([key(seed, purpose, epoch, i) for i in range(ROUNDS)], dtype=np.uint64)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply the finaliser of SplitMix64 (Steele, Lea & Flood 2014): every bit affects every bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
