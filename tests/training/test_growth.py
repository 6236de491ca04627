"""Nothing grows over a run: memory, open files, threads."""

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from worlds import finish

FROM, TO = 120, 420  # steps
LONG = (
    f"trainer.max_steps={TO + 20}",
    "trainer.val_check_interval=40",
    "callbacks.checkpoint.every_n_train_steps=20",
    "callbacks.samples.every_n_steps=200",
    "data.shards=1",
)


def watch(path: Path, hoard: bool = False) -> Callable[[int], None]:
    """A ``first`` of ``World`` that notes at two steps what the process holds."""

    def install(rank: int) -> None:
        from sturdy.training.module import DiffusionModule

        training_step, kept = DiffusionModule.training_step, []

        def watched(self, batch, batch_idx):
            if self.global_step in (FROM, TO):
                resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf(
                    "SC_PAGE_SIZE"
                )
                files = sum(
                    "/checkpoints" not in name for name in opened()
                )  # the writer's come and go
                with path.open("a") as file:
                    file.write(
                        json.dumps([resident / 2**20, files, threading.active_count()]) + "\n"
                    )
            if hoard:
                kept.append(b"x" * 100_000)
            return training_step(self, batch, batch_idx)

        DiffusionModule.training_step = watched

    return install


def opened() -> Iterator[str]:
    """The files that this process has open now."""
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            yield str(link.readlink())


def growth(tmp: Path, name: str, **how) -> tuple[float, int, int]:
    """MiB, open files and threads gained between the two steps."""
    finish(tmp, name, 1, *LONG, first=watch(tmp / f"{name}.json", **how))
    before, after = (json.loads(line) for line in (tmp / f"{name}.json").read_text().splitlines())
    return tuple(b - a for a, b in zip(before, after, strict=True))  # type: ignore[return-value]


@pytest.mark.slow
def test_nothing_grows(tmp_path: Path) -> None:
    memory, files, threads = growth(tmp_path, "run")
    print(f"{TO - FROM} steps: {memory:.1f} MiB, {files} files, {threads} threads")
    assert memory < 8
    assert files <= 0
    assert threads <= 0


@pytest.mark.slow
def test_a_hoard_of_100_kb_a_step_is_noticed(tmp_path: Path) -> None:
    assert growth(tmp_path, "hoarder", hoard=True)[0] > 20
