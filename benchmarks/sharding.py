"""Measure what shards and their sum cost: python benchmarks/sharding.py

The same small DiT, the same batches of 32, one thread a process; images/s as the run's own record
tells them, in turns. Prints medians, and ratios to the first line of each group.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from exact_resume.metrics import MetricsCSV

ROOT = Path(__file__).resolve().parents[1]
ROUNDS, STEPS, EVERY = 3, 60, 10
RUN = [
    "trainer=cpu",
    "trainer.threads=1",
    f"trainer.max_steps={STEPS}",
    f"trainer.val_check_interval={STEPS}",
    f"trainer.log_every_n_steps={EVERY}",
    "data.image_size=32",
    "data.batch_size=32",
    "data.source.n=100",
    "backbone=dit",
    "backbone.width=128",
    "backbone.patch=4",
    "backbone.depth=6",
    "callbacks.checkpoint.every_n_train_steps=null",
    "callbacks.samples.every_n_steps=null",
]
GROUPS = {
    "one process": {f"data.shards={v}": [f"data.shards={v}"] for v in (1, 2, 4, 8)},
    "two processes, data.shards=2": {
        f"reduction={how}": ["trainer.devices=2", "data.shards=2", f"reduction={how}"]
        for how in ("allreduce", "tree")
    },
    "two processes, data.shards=8": {
        f"reduction={how}": ["trainer.devices=2", "data.shards=8", f"reduction={how}"]
        for how in ("allreduce", "tree")
    },
}


Groups = dict[str, dict[str, list[str]]]


def rate(words: list[str], directory: Path) -> float:
    """Median images/s of a run, its first lines left out."""
    name = f"run-{len(list(directory.glob('run-*')))}"
    words = [
        *words,
        f"paths.runs={directory}",
        f"paths.cache={directory / 'cache'}",
        f"name={name}",
    ]
    subprocess.run(
        [sys.executable, ROOT / "train.py", *words], check=True, stdout=subprocess.DEVNULL
    )
    rates = MetricsCSV(directory / name / "metrics.csv").column("train/images_per_second")
    return statistics.median(list(rates.values())[1:])


def compare(run: list[str], groups: Groups, directory: Path) -> None:
    """Run every way of each group in turns, and print medians, and ratios to the first of each.

    Args:
        run: words of every run.
        groups: the words of each way, by its name.
        directory: for the runs.
    """
    rates: dict[tuple[str, str], list[float]] = defaultdict(list)
    for _ in range(ROUNDS):
        for group, ways in groups.items():
            for way, overrides in ways.items():
                rates[group, way].append(rate([*run, *overrides], directory))
    print(
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; images/s, median of {ROUNDS} runs"
    )
    for group, ways in groups.items():
        first = statistics.median(rates[group, next(iter(ways))])
        print(group)
        for way in ways:
            median = statistics.median(rates[group, way])
            print(f"    {way:22} {median:7.1f}   step time x {first / median:.2f}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        compare(RUN, GROUPS, Path(directory))
