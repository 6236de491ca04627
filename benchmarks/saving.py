"""Measure how long a save holds up training: python benchmarks/saving.py [megabytes]

One state (weights, their average, AdamW's two moments and step counters), saved in turns by torch,
by Lightning and by us; the disk is idle before each. Prints medians, and ratios to a plain
torch.save.
"""

import logging
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.plugins import AsyncCheckpointIO

from exact_resume.checkpoint.store import Store
from exact_resume.checkpoint.writer import StoreCheckpointIO

WIDTH, ROUNDS = 512, 4
ROWS = COPY, PLAIN, FSYNC, SYNC, ASYNC, AT_ONCE, FIRST, LATER, DURABLE = (
    "one copy in memory",
    "torch.save",
    "torch.save and fsync",
    "Lightning's checkpoint",
    "Lightning's AsyncCheckpointIO",
    "ours, the first, before its memory is there",
    "ours, the first",
    "ours, later ones",
    "ours, until it is durable; training goes on",
)
FORK = multiprocessing.get_context("fork")


def checkpoint(megabytes: int) -> dict[str, Any]:
    """A state of about that size: layers of ``(WIDTH, WIDTH)`` and ``(WIDTH,)``, each held four
    times.
    """
    layers = round(megabytes * 1e6 / (16 * WIDTH * (WIDTH + 1)))
    shapes = {
        f"layers.{i}.{name}": s
        for i in range(layers)
        for name, s in (("weight", (WIDTH, WIDTH)), ("bias", WIDTH))
    }
    weights, average = ({k: torch.randn(s) for k, s in shapes.items()} for _ in range(2))
    moments = {
        k: {"step": torch.tensor(1.0), "exp_avg": torch.randn(s), "exp_avg_sq": torch.rand(s)}
        for k, s in shapes.items()
    }
    both = {f"denoiser.{k}": v for k, v in weights.items()} | {
        f"ema.{k}": v for k, v in average.items()
    }
    return {"global_step": 0, "state_dict": both, "optimizer_states": [{"state": moments}]}


def tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list):
        for v in value.values() if isinstance(value, dict) else value:
            yield from tensors(v)


def plain(state: dict[str, Any], path: Path, *, durable: bool) -> None:
    with path.open("wb") as file:
        torch.save(state, file)
        if durable:
            file.flush()
            os.fsync(file.fileno())


def rest() -> None:
    """The disk is idle, and the process no more out of favour with the scheduler than any other."""
    os.sync()
    time.sleep(0.2)


class Bench:
    """Seconds by name of what was timed."""

    def __init__(self, directory: Path, state: dict[str, Any]) -> None:
        self.directory, self.state = directory, state
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name].append(time.perf_counter() - start)

    def alone(
        self, name: str, action: Callable[[Path], None], finish: Callable[[], None] = lambda: None
    ) -> None:
        """Time ``action``, and not what it leaves to be finished; then remove what was written."""
        path = self.directory / "state.ckpt"
        rest()
        with self.timed(name):
            action(path)
        finish()
        path.unlink(missing_ok=True)

    def ours(self, name: str, writer: StoreCheckpointIO) -> None:
        """Time what our save takes of training, and how long it is until it is durable."""
        self.state["global_step"] += 1
        rest()
        with self.timed(DURABLE):
            with self.timed(name):
                writer.save_checkpoint(self.state, writer.store.state(self.state["global_step"]))
            self.wait(writer)
        writer.store.prune(set())

    def first(self, name: str, *, reserve: bool) -> None:
        """Our first save in a process of its own, for there its buffers are memory that was never
        touched.
        """

        def child(answer: Any) -> None:
            with StoreCheckpointIO(
                Store(self.directory / "checkpoints"), lambda state: {}
            ) as writer:
                if reserve:  # as training does after its first step
                    writer.preallocate(self.state)
                    self.wait(writer)
                self.ours(name, writer)
            answer.send({name: seconds[-1] for name, seconds in self.seconds.items()})

        ours, its = FORK.Pipe()
        process = FORK.Process(target=child, args=(its,))
        process.start()
        self.seconds[name].append(ours.recv()[name])
        process.join()
        shutil.rmtree(self.directory / "checkpoints")

    def wait(self, writer: StoreCheckpointIO) -> None:
        """Until the writer has nothing to do."""
        while writer.free_buffers.qsize() < 2:
            time.sleep(0.001)

    def run(self) -> None:
        for _ in range(ROUNDS):
            self.first(FIRST, reserve=True)
            self.first(AT_ONCE, reserve=False)
        held = [torch.empty_like(x).zero_() for x in tensors(self.state)]
        lightning = TorchCheckpointIO()
        for _ in range(ROUNDS):
            rest()
            with self.timed(COPY):
                for a, b in zip(held, tensors(self.state), strict=True):
                    a.copy_(b)
            self.alone(PLAIN, lambda path: plain(self.state, path, durable=False))
            self.alone(FSYNC, lambda path: plain(self.state, path, durable=True))
            self.alone(SYNC, lambda path: lightning.save_checkpoint(self.state, path))
            background = AsyncCheckpointIO(TorchCheckpointIO())
            self.alone(
                ASYNC,
                lambda path, io=background: io.save_checkpoint(self.state, path),  # type: ignore[misc]
                background.teardown,
            )
            with StoreCheckpointIO(
                Store(self.directory / "checkpoints"), lambda state: {}
            ) as writer:
                writer.preallocate(self.state)
                self.wait(writer)
                for _ in range(2):
                    self.ours(LATER, writer)

    def table(self) -> str:
        median = {name: statistics.median(self.seconds[name]) for name in ROWS}
        lines = [
            f"| {name} | {median[name]:.3f} | {min(self.seconds[name]):.3f} to "
            f"{max(self.seconds[name]):.3f} "
            f"| {median[name] / median[PLAIN]:.2f} | {median[name] / median[COPY]:.1f} |"
            for name in ROWS
        ]
        head = [
            "| seconds that training waits | median | range | / torch.save | / one copy |",
            "|---|---|---|---|---|",
        ]
        return "\n".join([*head, *lines])


def main() -> None:
    state = checkpoint(int(sys.argv[1]) if len(sys.argv) > 1 else 400)
    size, n = sum(x.nbytes for x in tensors(state)), sum(1 for _ in tensors(state))
    load, threads = os.getloadavg()[0], torch.get_num_threads()
    print(
        f"{size / 1e6:.0f} MB in {n} tensors, {threads} threads, load {load:.1f}, {ROUNDS} rounds"
    )
    logging.disable(logging.INFO)
    directory = Path(tempfile.mkdtemp(prefix="bench-", dir="."))  # on the disk that runs are on
    try:
        bench = Bench(directory, state)
        bench.run()
        print(bench.table())
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
