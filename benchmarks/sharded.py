"""Measure full against sharded checkpoints under fsdp2: python benchmarks/sharded.py [megabytes]

Two processes hold one state together (weights, their average, AdamW's two moments). They save it
and load it again in both ways in turns, each time in new processes. Prints medians, ratios, and
how much memory each process needs beside the state that it trains.
"""

import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.strategies.model_parallel import _load_checkpoint
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from exact_resume.checkpoint.store import Store
from exact_resume.checkpoint.writer import StoreCheckpointIO

WIDTH, PROCESSES, ROUNDS, SAVES = 512, 2, 3, 4
FORK = multiprocessing.get_context("fork")


class Module(nn.Module):
    """A network of ``megabytes`` with its average and its optimizer, cut over the processes."""

    def __init__(self, megabytes: int) -> None:
        super().__init__()
        layers = max(1, round(megabytes * 1e6 / (16 * WIDTH * (WIDTH + 1))))
        self.network, self.average = (
            nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers))) for _ in range(2)
        )
        self.average.requires_grad_(False)
        mesh = init_device_mesh("cpu", (PROCESSES,))
        for network in (self.network, self.average):
            for layer in network:
                fully_shard(layer, mesh=mesh)
            fully_shard(network, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), foreach=False)
        self.network(torch.ones(1, WIDTH)).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self, step: int, *, whole: bool) -> dict[str, Any]:
        """Return what Lightning would save."""
        options = StateDictOptions(full_state_dict=whole, cpu_offload=whole)
        optimizer = get_optimizer_state_dict(self, self.optimizer, options=options)
        return {
            "state_dict": get_model_state_dict(self, options=options),
            "optimizer_states": [optimizer],
            "global_step": step,
            "lr_schedulers": [],
            "loops": {},
            "pytorch-lightning_version": "2.6.6",
        }


class Memory:
    """The memory that this process takes beyond what it has now."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what there is
        self.before = self._read("VmRSS")

    def peak(self) -> float:
        """Return the largest excess so far, in MB."""
        return (self._read("VmHWM") - self.before) / 1e3

    @staticmethod
    def _read(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


@contextmanager
def timed(seconds: list[float]) -> Iterator[None]:
    """Add the time until all processes are done."""
    dist.barrier()
    start = time.perf_counter()
    yield
    dist.barrier()
    seconds.append(time.perf_counter() - start)


def save(module: Module, writer: StoreCheckpointIO, found: dict[str, list[float]]) -> None:
    """Save ``SAVES`` times as a callback would."""
    whole = not writer.sharded
    memory = Memory()
    with writer:
        if writer.sharded:
            writer.preallocate(module.state(0, whole=False))
        for step in range(1, SAVES + 1):
            while writer.free_buffers.qsize() < 2:
                time.sleep(0.01)
            os.sync()
            start = time.perf_counter()
            with timed(found["blocked, the first save" if step == 1 else "blocked, later saves"]):
                state = module.state(step, whole=whole)
                if writer.sharded or dist.get_rank() == 0:
                    writer.save_checkpoint(state, writer.store.state(step))
                del state
            while writer.free_buffers.qsize() < 2:
                time.sleep(0.001)
            dist.barrier()
            found["until it is durable"].append(time.perf_counter() - start)
    found["peak of saving"].append(memory.peak())


def load(module: Module, writer: StoreCheckpointIO, found: dict[str, list[float]]) -> None:
    """Load the last of them into the module."""
    path = writer.store.state(SAVES)
    memory = Memory()
    with timed(found["load"]):
        if writer.load_into(path, module, [module.optimizer]) is None:
            _load_checkpoint(
                path,
                {"state_dict": module, "optimizer_0": module.optimizer},
                optimizer_states_from_list=True,
                weights_only=True,
            )
    found["peak of loading"].append(memory.peak())


def work(rank: int, megabytes: int, directory: Path, action: str, kind: str) -> None:
    """Do one thing in one way, and write what was found."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(PROCESSES)}
    meeting = dist.FileStore(str(directory / f"meeting-{action}-{kind}"), PROCESSES)
    dist.init_process_group(
        "gloo", store=meeting, rank=rank, world_size=PROCESSES, timeout=timedelta(minutes=10)
    )
    writer = StoreCheckpointIO(Store(directory / kind), lambda state: {})
    writer.sharded = kind == "sharded"
    found: dict[str, list[float]] = defaultdict(list)
    {"save": save, "load": load}[action](Module(megabytes), writer, found)
    (directory / f"{action}-{kind}-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def measure(megabytes: int) -> dict[tuple[str, str], list[float]]:
    """Return the measured values by row and kind."""
    values: dict[tuple[str, str], list[float]] = defaultdict(list)
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as name:
            directory = Path(name)
            for action in ("save", "load"):
                for kind in ("full", "sharded"):
                    arguments = [(rank, megabytes, directory, action, kind) for rank in range(2)]
                    processes = [FORK.Process(target=work, args=each) for each in arguments]
                    for process in processes:
                        process.start()
                    for process in processes:
                        process.join()
                        assert process.exitcode == 0
                    for rank in range(PROCESSES):
                        found = json.loads((directory / f"{action}-{kind}-{rank}.json").read_text())
                        for row, seconds in found.items():
                            is_memory = row.startswith("peak")
                            if is_memory or rank == 0:
                                row = f"{row}, process {rank}" if is_memory else row
                                values[row, kind] += seconds
    return values


def main() -> None:
    """Print the table."""
    megabytes = int(sys.argv[1]) if len(sys.argv) > 1 else 150
    print(f"{megabytes} MB of state on {PROCESSES} processes, load {os.getloadavg()[0]:.1f}")
    values = measure(megabytes)
    print(f"{'':34}{'full':>24}{'sharded':>24}   ratio")
    for row in dict.fromkeys(row for row, _ in values):
        unit = "MB" if row.startswith("peak") else "s"
        cells = []
        for kind in ("full", "sharded"):
            numbers = values[row, kind]
            middle = statistics.median(numbers)
            cells.append(
                (middle, f"{middle:.2f} ({min(numbers):.2f} to {max(numbers):.2f}) {unit}")
            )
        ratio = cells[1][0] / max(cells[0][0], 1e-9)
        print(f"{row:34}{cells[0][1]:>24}{cells[1][1]:>24}   {ratio:.2f}")


if __name__ == "__main__":
    main()
