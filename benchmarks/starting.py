"""Measure the time from SIGKILL to the first new step of a small run: python benchmarks/starting.py

The floor is a process that imports torch and lightning, and does nothing. Taken in turns; prints
medians.
"""

import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from exact_resume.metrics import MetricsCSV

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 3
SMALL = [
    "trainer=cpu",
    "trainer.max_steps=1000000",
    "trainer.log_every_n_steps=1",
    "data.image_size=16",
    "data.batch_size=8",
    "data.source.n=60",
    "backbone.width=16",
    "backbone.head_dim=8",
    "backbone.multipliers=[1,2]",
    "backbone.attention=[False,True]",
    "backbone.blocks=1",
    "callbacks.checkpoint.every_n_train_steps=3",
]


def start(directory: Path) -> subprocess.Popen[bytes]:
    words = [*SMALL, f"paths.runs={directory}", f"paths.cache={directory / 'cache'}", "name=run"]
    return subprocess.Popen([sys.executable, ROOT / "train.py", *words], stdout=subprocess.DEVNULL)


def steps(metrics: Path) -> list[int]:
    return [int(row["step"]) for row in MetricsCSV(metrics).rows()]


def cut(metrics: Path, step: int) -> None:
    """Drop the rows after ``step``, as the run will, so that the first new one is noticed."""
    MetricsCSV(metrics).cut(step)


def until(process: subprocess.Popen[bytes], metrics: Path, step: int) -> None:
    """Return when ``metrics`` holds ``step``."""
    while max(steps(metrics), default=0) < step:
        if process.poll() is not None:
            raise SystemExit(f"the run ended with code {process.returncode}")
        time.sleep(0.01)


def main() -> None:
    directory = Path(tempfile.mkdtemp(prefix="bench-", dir="."))
    metrics, checkpoints = directory / "run" / "metrics.csv", directory / "run" / "checkpoints"
    imports, restarts = [], []
    print(f"load {os.getloadavg()[0]:.1f}, {ROUNDS} rounds")
    process = start(directory)
    try:
        until(process, metrics, 6)
        for _ in range(ROUNDS):
            begin = time.perf_counter()
            process.send_signal(signal.SIGKILL)
            process.wait()
            entry = max(int(path.name[5:]) for path in checkpoints.glob("step-*"))
            cut(metrics, entry)
            process = start(directory)
            until(process, metrics, entry + 1)
            restarts.append(time.perf_counter() - begin)
            until(process, metrics, entry + 7)
            process.send_signal(signal.SIGSTOP)
            begin = time.perf_counter()
            subprocess.run([sys.executable, "-c", "import torch, lightning"], check=True)
            imports.append(time.perf_counter() - begin)
            process.send_signal(signal.SIGCONT)
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(directory)
    print("| seconds | median | range |", "|---|---|---|", sep="\n")
    for name, seconds in (
        ("import torch, lightning", imports),
        ("from SIGKILL to the first new step", restarts),
    ):
        print(
            f"| {name} | {statistics.median(seconds):.1f} | {min(seconds):.1f} to "
            f"{max(seconds):.1f} |"
        )


if __name__ == "__main__":
    main()
