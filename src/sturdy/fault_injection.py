"""Train with one mechanism taken away, as a control: python -m sturdy.fault_injection order
train.py experiment=cars

Whoever compares runs after kills must notice each of these; if not, he compares nothing.
"""

import runpy
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any


def order() -> None:
    """The stream of positions begins anew at every start of the process."""
    import sturdy.data.datamodule as module

    class Restarting(module.InfiniteBatchSampler):
        def __init__(self, start: int, *rest: Any) -> None:
            super().__init__(0, *rest)

    module.InfiniteBatchSampler = Restarting  # type: ignore[assignment,misc]


def noise() -> None:
    """Noise, times and label drop from generators numbered by how many were asked for since the
    process started.
    """
    from exact_resume import randomness

    calls = count()

    def generators(self: randomness.Draws, purpose: str) -> Iterator[randomness.torch.Generator]:
        return (randomness.generator(self.seed, purpose, next(calls)) for _ in self.positions)

    randomness.Draws.generators = generators  # type: ignore[method-assign]


def dropout() -> None:
    """Dropout from the default generator as it stands."""
    import sturdy.training.module as module

    module.reseed = lambda *parts: None


FAULTS: dict[str, Callable[..., None]] = {"order": order, "noise": noise, "dropout": dropout}


def main(ways: dict[str, Callable[..., None]]) -> None:
    """Sabotage as the first word says (``way`` or ``way:argument,argument``), then run the script
    of the second.
    """
    _, word, *sys.argv = sys.argv
    way, _, arguments = word.partition(":")
    ways[way](*filter(None, arguments.split(",")))
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))  # as if it had been started itself
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main(FAULTS)
