"""Nothing grows over a run: memory, open files, threads."""

import functools
import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from worlds import finish

FROM, TO = 120, 420  # steps
WINDOW = 15  # steps, of the 20 from one save to the next
LONG = (
    f"trainer.max_steps={TO + 20}",
    "trainer.val_check_interval=40",
    "callbacks.checkpoint.every_n_train_steps=20",
    "callbacks.samples.every_n_steps=200",
    "data.shards=1",
)


def watch(path: Path, hoard: bool = False) -> Callable[[int], None]:
    """Return a ``first`` of ``World`` that notes what the process holds, at some steps."""

    def install(rank: int) -> None:
        from sturdy.training.module import DiffusionModule

        training_step, kept = DiffusionModule.training_step, []

        def watched(self, batch, batch_idx):
            if any(start <= self.global_step < start + WINDOW for start in (FROM, TO)):
                pages = int(Path("/proc/self/statm").read_text().split()[1])
                resident = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
                with path.open("a") as file:
                    held = [self.global_step, resident, list(opened()), threading.active_count()]
                    file.write(json.dumps(held) + "\n")
            if hoard:
                kept.append((b"x" * 100_000, os.open(__file__, os.O_RDONLY)))
            return training_step(self, batch, batch_idx)

        DiffusionModule.training_step = watched

    return install


def opened() -> Iterator[str]:
    """The files that this process has open now."""
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            yield str(link.readlink())


def growth(tmp: Path, name: str, **how: bool) -> tuple[float, list[str], int]:
    """Return the MiB, open files and threads gained between the two windows of steps.

    The files of the thread that saves come and go. So a file counts if it is open at every step of
    a window.
    """
    path = tmp / f"{name}.json"
    finish(tmp, name, 1, *LONG, first=watch(path, **how))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    before = [line for line in lines if line[0] < TO]
    after = [line for line in lines if line[0] >= TO]
    assert len(before) == len(after) == WINDOW
    files = held_throughout(after) - held_throughout(before)
    threads = min(line[3] for line in after) - min(line[3] for line in before)
    return after[0][1] - before[0][1], list(files.elements()), threads


def held_throughout(lines: list[Any]) -> Counter[str]:
    """Return how often each file is open at every step of ``lines``."""
    return functools.reduce(lambda a, b: a & b, (Counter(line[2]) for line in lines))


@pytest.mark.slow
def test_nothing_grows(tmp_path: Path) -> None:
    memory, files, threads = growth(tmp_path, "run")
    print(f"{TO - FROM} steps: {memory:.1f} MiB, {len(files)} files, {threads} threads")
    assert memory < 8
    assert files == []
    assert threads <= 0


@pytest.mark.slow
def test_a_hoard_of_100_kb_and_a_file_a_step_is_noticed(tmp_path: Path) -> None:
    memory, files, _ = growth(tmp_path, "hoarder", hoard=True)
    assert memory > 20
    assert len(files) > 200
