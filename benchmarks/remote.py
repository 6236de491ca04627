"""Measure what a second copy costs training: python benchmarks/remote.py [pairs]

The same run with and without a second copy, in alternating pairs; the copy goes to an S3 server on
this machine, which competes for its cores. Prints ratios, and how long a save holds up training.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from exact_resume import Checkpoint, ExactTraining, PositionData
from exact_resume.checkpoint.writer import StoreCheckpointIO

ROOT = Path(__file__).resolve().parents[1]
WIDTH, DEPTH, BATCH = 512, 4, 64
EVERY, WARMUP, STEPS = 40, 20, 300  # steps


class Network(L.LightningModule):
    """Layers of ``(WIDTH, WIDTH)``."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)]
        self.network = nn.Sequential(*layers)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.mse_loss(self.network(batch[0]), batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


class Meter(Callback):
    """Wall time, and CPU time of the main thread and of the process, from ``WARMUP`` to the end."""

    def __init__(self) -> None:
        self.start: list[float] = []
        self.end: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == WARMUP:
            self.start = self.clocks()
        if trainer.global_step == STEPS - 1:
            self.end = self.clocks()

    def clocks(self) -> list[float]:
        return [time.perf_counter(), time.thread_time(), time.process_time()]


def run(home: str, url: str) -> None:
    """Train once; print a line of JSON."""
    torch.set_num_threads(1)
    blocked = []
    save = StoreCheckpointIO.save_checkpoint

    def timed(self: StoreCheckpointIO, *args: Any, **kwargs: Any) -> None:
        start = time.perf_counter()
        save(self, *args, **kwargs)
        blocked.append(time.perf_counter() - start)

    StoreCheckpointIO.save_checkpoint = timed  # type: ignore[method-assign]
    L.seed_everything(0, verbose=False)
    remote = {} if url == "-" else {"remote": url}
    training = ExactTraining(home, checkpoint=Checkpoint(every_n_train_steps=EVERY, **remote))
    options = training.trainer_options()
    meter = Meter()
    callbacks = [*options.pop("callbacks"), meter]
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        enable_progress_bar=False,
        callbacks=callbacks,
        **options,
    )
    data = TensorDataset(torch.randn(4096, WIDTH, generator=torch.Generator().manual_seed(0)))
    code = training.fit(trainer, Network(), PositionData(data, batch_size=BATCH))
    assert code == 0
    wall, main, process = (b - a for a, b in zip(meter.start, meter.end, strict=True))
    size = sum(path.stat().st_size for path in Path(home).glob("checkpoints/*/state.ckpt"))
    log = "".join(path.read_text() for path in Path(home).glob("attempts/*/log.txt"))
    copied = log.count("is in the second copy")
    measured = {
        "steps_per_s": (STEPS - 1 - WARMUP) / wall,
        "main_cpu": main,
        "process_cpu": process,
        "blocked": statistics.median(blocked[1:]),
        "megabytes": size / 1e6 / len([*Path(home).glob("checkpoints/*/state.ckpt")]),
        "copied": copied,
    }
    print("measured " + json.dumps(measured), flush=True)


def measure(home: Path, url: str, environment: dict[str, str]) -> dict[str, float]:
    """Train once in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--run", str(home), url],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("measured ")]
    assert lines, done.stdout + done.stderr
    found: dict[str, float] = json.loads(lines[0].removeprefix("measured "))
    return found


def main(pairs: int) -> None:
    """Print the table."""
    sys.path[:0] = [str(ROOT / "tests")]
    from s3_server import BUCKET, s3_server

    runs: dict[str, list[dict[str, float]]] = {"without": [], "with": []}
    with s3_server() as server, tempfile.TemporaryDirectory(prefix="bench-", dir=".") as directory:
        direct = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.port}"}
        environment = server.environment() | direct  # without the proxy, which is slow
        for i in range(pairs):
            order = ("without", "with") if i % 2 == 0 else ("with", "without")
            for name in order:
                url = f"s3://{BUCKET}/{i}" if name == "with" else "-"
                runs[name].append(measure(Path(directory) / f"{name}-{i}", url, environment))
    first = runs["with"][0]
    copied = statistics.median(r["copied"] for r in runs["with"])
    print(
        f"state of {first['megabytes']:.1f} MB every {EVERY} steps, {copied:.0f} of "
        f"{STEPS // EVERY + 1} copied, {pairs} pairs, load {os.getloadavg()[0]:.1f}"
    )
    print("| | without | with | with / without, median of pairs | range |\n|---|---|---|---|---|")
    labels = {
        "steps_per_s": "steps/s",
        "main_cpu": f"CPU s of the main thread in {STEPS - 1 - WARMUP} steps",
        "process_cpu": "CPU s of the process",
        "blocked": "s that a save holds up training",
    }
    for key, label in labels.items():
        values = {name: [r[key] for r in found] for name, found in runs.items()}
        ratios = [b / a for a, b in zip(values["without"], values["with"], strict=True)]
        medians = [statistics.median(values[name]) for name in ("without", "with")]
        print(
            f"| {label} | {medians[0]:.3g} | {medians[1]:.3g} "
            f"| {statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} |"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        run(*sys.argv[2:])
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 4)
