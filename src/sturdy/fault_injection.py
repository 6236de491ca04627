"""Train with one mechanism taken away: python -m sturdy.fault_injection order train.py ...

A control: a comparison of runs after kills must notice each of these faults; if it does not, it
compares nothing.
"""

import runpy
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Generator


def restart_order() -> None:
    """Begin the stream of positions anew at every start of the process."""
    import sturdy.data.datamodule as module

    class RestartingSampler(module.InfiniteBatchSampler):
        def __init__(self, start: int, *rest: Any) -> None:
            super().__init__(0, *rest)

    module.InfiniteBatchSampler = RestartingSampler  # type: ignore[assignment,misc]


def draw_noise_by_count() -> None:
    """Draw noise, times and label drop by how many were drawn since the process started."""
    from exact_resume import randomness

    calls = count()

    def generators(self: randomness.Draws, purpose: str) -> Iterator["Generator"]:
        return (randomness.generator(self.seed, purpose, next(calls)) for _ in self.positions)

    randomness.Draws.generators = generators  # type: ignore[method-assign]


def never_reseed() -> None:
    """Draw dropout from the default generator as it is."""
    import sturdy.training.module as module

    module.reseed = lambda *parts: None


FAULTS: dict[str, Callable[..., None]] = {
    "order": restart_order,
    "noise": draw_noise_by_count,
    "dropout": never_reseed,
}


def main(faults: dict[str, Callable[..., None]]) -> None:
    """Inject the fault of the first word, then run the script of the second.

    Args:
        faults: what to call, by the first word: ``fault`` or ``fault:argument,argument``.
    """
    _, word, *sys.argv = sys.argv
    name, _, arguments = word.partition(":")
    faults[name](*filter(None, arguments.split(",")))
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))  # as if it had been started itself
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main(FAULTS)
