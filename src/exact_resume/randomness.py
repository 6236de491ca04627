"""All randomness of a run: derived, and never remembered.

Everything random about the sample at position p is a function of (seed, purpose, p). Everything
random inside a shard's forward pass is a function of (seed, step, shard):

    draw = generator(seed, purpose, p)        reseed(seed, step, shard)

So there is no random state to save, and no process, worker or prefetch queue can shift it.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor


def key(*parts: int | str) -> int:
    """Hash the tuple ``parts`` to 63 bits.

    Never add seeds instead: (1, 5) and (2, 4) would collide.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """Return a CPU generator for ``parts``; ``randn`` on a GPU would depend on the card's model."""
    return torch.Generator().manual_seed(key(*parts))


def reseed(*parts: int | str) -> None:
    """Seed PyTorch's default generators on every device; dropout draws from them."""
    seed = key(*parts)
    torch.default_generator.manual_seed(seed)
    # Before CUDA is initialised, seeding it would record the call stack each time, which takes ms.
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)


class Draws:
    """The random numbers of the samples at ``positions``, by purpose.

    Args:
        seed: the run's seed.
        positions: global positions, one for each of the b samples.
    """

    def __init__(self, seed: int | str, positions: Sequence[int]) -> None:
        self.seed = seed
        self.positions = positions

    def __len__(self) -> int:
        return len(self.positions)

    def generators(self, purpose: str) -> Iterator[torch.Generator]:
        """Yield one generator for each sample; the same purpose gives the same numbers again."""
        return (generator(self.seed, purpose, int(p)) for p in self.positions)

    def normal(self, purpose: str, shape: Sequence[int] = ()) -> Tensor:
        """Draw standard normal numbers, float32 on the CPU, ``(b, *shape)``."""
        return self._fill(purpose, shape, Tensor.normal_)

    def uniform(self, purpose: str, shape: Sequence[int] = ()) -> Tensor:
        """Draw uniform numbers on [0, 1), float32 on the CPU, ``(b, *shape)``."""
        return self._fill(purpose, shape, Tensor.uniform_)

    def _fill(self, purpose: str, shape: Sequence[int], method: Callable[..., object]) -> Tensor:
        out = torch.empty(len(self), *shape)
        for row, rng in zip(out, self.generators(purpose), strict=True):
            method(row, generator=rng)
        return out
