"""Measure the time from SIGKILL to the first new step of a small run: python benchmarks/starting.py

The floor is a process that imports torch and lightning, and does nothing. Then the imports of a run
with and without transformers: hidden as if it were not installed, installed, and imported as
torchmetrics does by itself. Taken in turns; prints medians.
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
RUN = "import sturdy.training.session"
HIDE = """
import sys
from importlib import metadata
find = metadata.distribution
def distribution(name):
    if name == "transformers":
        raise metadata.PackageNotFoundError(name)
    return find(name)
metadata.distribution = distribution
sys.modules["transformers"] = None
"""
IMPORTS = {
    "imports of a run, transformers not installed": HIDE + RUN,
    "imports of a run, transformers installed": RUN,
    "the same after a plain import of lightning": f"import lightning\n{RUN}",
}


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


def seconds(code: str) -> float:
    """Return how long a process takes that runs ``code``."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - begin


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
            imports.append(seconds("import torch, lightning"))
            process.send_signal(signal.SIGCONT)
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(directory)
    tables: dict[str, list[float]] = {
        "import torch, lightning": imports,
        "from SIGKILL to the first new step": restarts,
        **{name: [] for name in IMPORTS},
    }
    for _ in range(ROUNDS):
        for name, code in IMPORTS.items():
            tables[name].append(seconds(code))
    print("| seconds | median | range |", "|---|---|---|", sep="\n")
    for name, taken in tables.items():
        middle = statistics.median(taken)
        print(f"| {name} | {middle:.1f} | {min(taken):.1f} to {max(taken):.1f} |")
    without, *others = (statistics.median(tables[name]) for name in IMPORTS)
    for name, taken in zip([*IMPORTS][1:], others, strict=True):
        print(f"{name}: {taken / without:.2f} times as long as where it is not installed")


if __name__ == "__main__":
    main()
