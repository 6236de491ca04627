"""All randomness of a run, derived and never remembered.

Whatever is random about the sample at position ``p`` is a function of ``(seed, purpose, p)``;
whatever is random inside a shard's forward pass is a function of ``(seed, step, shard)``:

    draw = generator(seed, purpose, p)        reseed(seed, step, shard)

So there is no random state to save, and no process, worker or prefetch queue that could shift it.
"""

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def key(*parts: int | str) -> int:
    """Hash the tuple ``parts`` to 63 bits. Never add seeds instead: (1, 5) and (2, 4) would
    collide.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator of its own for ``parts``; on a GPU ``randn`` would depend on the model of the
    card.
    """
    return torch.Generator().manual_seed(key(*parts))


def reseed(*parts: int | str) -> None:
    """Reseed PyTorch's default generators, on every device; what is left for them is dropout."""
    seed = key(*parts)
    torch.default_generator.manual_seed(seed)
    if (
        torch.cuda.is_initialized()
    ):  # before, torch.manual_seed would note the whole call stack each time, some ms
        torch.cuda.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)


class Draws:
    """The randomness of the samples at ``positions``, asked for by purpose.

    Args:
        seed: the run's seed.
        positions: global positions, one a sample; the batch size ``b`` is their number.
    """

    def __init__(self, seed: int | str, positions: Sequence[int]) -> None:
        self.seed = seed
        self.positions = positions

    def __len__(self) -> int:
        return len(self.positions)

    def generators(self, purpose: str) -> Iterator[torch.Generator]:
        """One generator a sample; the same purpose gives the same numbers again."""
        return (generator(self.seed, purpose, int(p)) for p in self.positions)

    def normal(self, purpose: str, shape: Sequence[int] = ()) -> Tensor:
        """Standard normal, float32 on the CPU, ``(b, *shape)``."""
        return self._fill(purpose, shape, Tensor.normal_)

    def uniform(self, purpose: str, shape: Sequence[int] = ()) -> Tensor:
        """Uniform on [0, 1), float32 on the CPU, ``(b, *shape)``."""
        return self._fill(purpose, shape, Tensor.uniform_)

    def _fill(self, purpose: str, shape: Sequence[int], method) -> Tensor:
        out = torch.empty(len(self), *shape)
        for row, rng in zip(out, self.generators(purpose), strict=True):
            method(row, generator=rng)
        return out
