"""Draw docs/images/kills.png: train a small run twice, once under SIGKILL, and compare them.

    python docs/images/make_figures.py          # two minutes on a CPU core

The script ends with an error if the two runs differ in a single bit of the weights.
"""

import csv
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import matplotlib
import torch

matplotlib.use("agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[2]
STEPS = 300
KILL_AT = (50, 82, 145, 176, 236)
WORDS = (
    "experiment=cars trainer=cpu trainer.threads=1 data.image_size=16 data.source.n=400 "
    "backbone.width=64 backbone.depth=2 backbone.patch=2 logger=csv callbacks.samples=null "
    f"callbacks.checkpoint.every_n_train_steps=30 trainer.max_steps={STEPS} "
    f"trainer.val_check_interval={STEPS} trainer.log_every_n_steps=2"
).split()


def main() -> None:
    """Train both runs, check that they are equal, and write the figure."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        train(home, "undisturbed", [])
        lives = train(home, "killed", list(KILL_AT))
        undisturbed = read_losses(home / "runs" / "undisturbed")
        killed = read_losses(home / "runs" / "killed")
        if not equal_weights(home / "runs" / "undisturbed", home / "runs" / "killed"):
            sys.exit("the two runs differ")
    draw(lives, undisturbed, killed)


def train(home: Path, name: str, kill_at: list[int]) -> list[list[tuple[float, int]]]:
    """Train a run to its end; kill its process at each of the steps ``kill_at``.

    Returns:
        For each process, the pairs (seconds since the first start, step) that were seen.
    """
    paths = [f"paths.runs={home / 'runs'}", f"paths.cache={home / 'cache'}", f"name={name}"]
    command = [sys.executable, str(ROOT / "train.py"), *WORDS, *paths]
    begin = time.monotonic()
    lives = []
    for target in [*kill_at, None]:
        life: list[tuple[float, int]] = []
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        left_by_last_process = newest_step(home / "runs" / name)
        while process.poll() is None:
            step = newest_step(home / "runs" / name)
            if step != (life[-1][1] if life else left_by_last_process):
                life.append((time.monotonic() - begin, step))
            if target is not None and life and life[-1][1] >= target:
                process.kill()
                process.wait()
                break
            time.sleep(0.01)
        lives.append(life)
    if process.returncode:
        sys.exit(f"{name} ended with exit code {process.returncode}")
    return lives


def newest_step(run: Path) -> int:
    """Return the last step in ``metrics.csv``; 0 before there is one."""
    try:
        last = (run / "metrics.csv").read_text().splitlines()[-1]
        return int(last.split(",")[0])
    except (OSError, IndexError, ValueError):
        return 0


def read_losses(run: Path) -> dict[int, float]:
    """Return the training loss of every step."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    return {int(row["step"]): float(row["train/loss"]) for row in rows}


def equal_weights(a: Path, b: Path) -> bool:
    """Return whether the last checkpoints of two runs hold the same bits."""
    states = []
    for run in (a, b):
        file = run / "checkpoints" / f"step-{STEPS:08d}" / "state.ckpt"
        states.append(torch.load(file, weights_only=True)["state_dict"])
    first, second = states
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def draw(
    lives: list[list[tuple[float, int]]], undisturbed: dict[int, float], killed: dict[int, float]
) -> None:
    """Write the figure beside this file."""
    plt.rcParams["axes.titlesize"] = 10
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 2.7), layout="constrained")
    for life in lives:
        left.plot(*zip(*life, strict=True), color="tab:blue")
    for life in lives[:-1]:
        left.plot(*life[-1], "x", color="tab:red", markersize=8, markeredgewidth=2)
    left.plot([], [], "x", color="tab:red", markeredgewidth=2, label="SIGKILL")
    left.set(xlabel="seconds", ylabel="step", title="The same command, killed five times")
    left.legend(frameon=False)
    right.plot(
        list(undisturbed),
        list(undisturbed.values()),
        color="0.75",
        linewidth=4,
        label="undisturbed",
    )
    right.plot(list(killed), list(killed.values()), color="tab:blue", linewidth=1, label="killed")
    for life in lives[:-1]:
        right.axvline(life[-1][1], color="tab:red", linewidth=0.8, linestyle=":")
    equal = undisturbed == killed
    title = "Every loss and every weight: the same bits" if equal else "The losses differ"
    right.set(xlabel="step", ylabel="training loss", title=title)
    right.legend(frameon=False)
    figure.savefig(Path(__file__).parent / "kills.png", dpi=90)


if __name__ == "__main__":
    main()
