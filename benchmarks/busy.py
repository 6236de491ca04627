"""Measure what other programs cost a run, by its way of waiting: python benchmarks/busy.py

A run of experiment=cars, alone, then beside three busy processes for every two CPUs, then alone
again; once for each callbacks.waiting.policy. Takes about four minutes, on a quiet machine.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from starting import steps, until

from exact_resume.system import available_cpus

ROOT = Path(__file__).resolve().parents[1]
SETTLE, MEASURE = 10, 12  # seconds: after a change, and of a measurement
CALM = [
    "experiment=cars",
    "trainer=cpu",
    "trainer.max_steps=1000000",
    "trainer.val_check_interval=1000000",
    "trainer.log_every_n_steps=1",
    "callbacks.samples.every_n_steps=1000000",
    "callbacks.checkpoint.every_n_train_steps=1000000",
    "learning_rate=constant",
    "data.source.n=500",
]


def start(directory: Path, policy: str) -> subprocess.Popen[bytes]:
    words = [
        *CALM,
        f"paths.runs={directory}",
        f"paths.cache={directory / 'cache'}",
        f"name={policy}",
    ]
    words.append(f"callbacks.waiting.policy={policy}")
    return subprocess.Popen([sys.executable, ROOT / "train.py", *words], stdout=subprocess.DEVNULL)


def speed(metrics: Path) -> float:
    """Measure steps a second, after a while."""
    time.sleep(SETTLE)
    first, begin = steps(metrics)[-1], time.monotonic()
    time.sleep(MEASURE)
    return (steps(metrics)[-1] - first) / (time.monotonic() - begin)


def main() -> None:
    directory = Path(tempfile.mkdtemp(prefix="bench-", dir="."))
    busy = 3 * available_cpus() // 2
    print(
        f"{available_cpus()} CPUs, load {os.getloadavg()[0]:.1f}; images/s, and as a share of "
        f"`spin` alone"
    )
    print(
        f"| policy | alone | beside {busy} busy processes | alone again |",
        "|---|---|---|---|",
        sep="\n",
    )
    unit = 0.0
    try:
        for policy in ("spin", "sleep", "auto"):
            run = start(directory, policy)
            others: list[subprocess.Popen[bytes]] = []
            try:
                metrics = directory / policy / "metrics.csv"
                until(run, metrics, 20)
                rates = [speed(metrics)]
                others = [
                    subprocess.Popen([sys.executable, "-c", "while True: pass"])
                    for _ in range(busy)
                ]
                rates.append(speed(metrics))
                for other in others:
                    other.kill()
                rates.append(speed(metrics))
            finally:
                for process in (*others, run):
                    process.kill()
                    process.wait()
            unit = unit or rates[0]
            print(
                f"| {policy} |",
                *(f"{16 * rate:.0f} ({rate / unit:.2f}) |" for rate in rates),
                flush=True,
            )
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
