"""Measure what a failure costs a small real run: python benchmarks/restarting.py

Two processes of one run train under the supervisor, and one of them is killed. Prints when that is
noticed, when the new processes have trained a step, and what a save costs.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from exact_resume.checkpoint_interval import SAVE_COST
from exact_resume.metrics import MetricsCSV

ROOT = Path(__file__).resolve().parents[1]
WORDS = (
    "experiment=cars trainer=cpu trainer.devices=2 trainer.threads=1 restarts=2 "
    "data.image_size=16 data.batch_size=8 data.source.n=400 backbone.width=64 "
    "backbone.depth=2 backbone.patch=2 logger=csv callbacks.samples=null "
    "trainer.max_steps=1000000 trainer.val_check_interval=1000000 trainer.log_every_n_steps=1 "
    "callbacks.checkpoint.every=auto callbacks.checkpoint.mean_time_between_failures=0.05"
).split()


def main() -> None:
    """Start a run, kill a process, wait until it trains again, and print the times."""
    directory = Path(tempfile.mkdtemp(prefix="bench-", dir="."))
    paths = [f"paths.runs={directory}", f"paths.cache={directory / 'cache'}", "name=run"]
    home = directory / "run"
    output = directory / "output.txt"
    load = os.getloadavg()[0]
    with output.open("wb") as file:
        begin = time.perf_counter()
        command = [sys.executable, ROOT / "train.py", *WORDS, *paths]
        process = subprocess.Popen(command, stdout=file)
    try:
        wait_for(process, lambda: newest_step(home) >= 1)
        start = time.perf_counter() - begin
        wait_for(process, lambda: (home / SAVE_COST).exists() and newest_step(home) >= 40)
        before = newest_step(home)
        time.sleep(5)
        step = 5 / max(1, newest_step(home) - before)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        begin = time.perf_counter()
        os.kill(int(children[-1]), signal.SIGKILL)
        wait_for(process, lambda: b"restart 1 of" in output.read_bytes())
        noticed = time.perf_counter() - begin
        wait_for(process, lambda: b"resumed from step" in output.read_bytes())
        announced = time.perf_counter() - begin - noticed
        entry = int(output.read_bytes().split(b"resumed from step ")[1].split(b",")[0])
        wait_for(process, lambda: newest_step(home) <= entry)  # later rows were cut
        wait_for(process, lambda: newest_step(home) > entry)
        again = time.perf_counter() - begin - noticed
        cost = json.loads((home / SAVE_COST).read_bytes())
        size = max(path.stat().st_size for path in home.glob("checkpoints/*/state.ckpt")) / 1e6
    finally:
        process.terminate()
        process.wait()
        shutil.rmtree(directory)
    print(f"{os.cpu_count()} cores, load {load:.1f}, two processes\n")
    print("| | s |", "|---|---|", sep="\n")
    seconds = {
        "the first start, to the end of its first step": start,
        "a step": step,
        "from SIGKILL of one process to the restart of both": noticed,
        "from the restart until the run says where it resumes": announced,
        "from the restart to the end of a new step": again,
        f"training waits for a save ({size:.1f} MB)": cost["blocked"],
        "until it is durable": cost["durable"],
    }
    for name, value in seconds.items():
        print(f"| {name} | {value:.3g} |")


def newest_step(home: Path) -> int:
    """Return the newest step in the record of the run."""
    rows = MetricsCSV(home / "metrics.csv").rows()
    return max((int(row["step"]) for row in rows), default=0)


def wait_for(process: "subprocess.Popen[bytes]", condition: Callable[[], bool]) -> None:
    """Return when ``condition`` holds; exit if the run ends before."""
    while not condition():
        if process.poll() is not None:
            raise SystemExit(f"the run ended with code {process.returncode}")
        time.sleep(0.02)


if __name__ == "__main__":
    main()
