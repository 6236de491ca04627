"""Print digests of a dozen small runs, to compare before and after a change.

    python benchmarks/dozen.py > before.txt        # in the old checkout
    python benchmarks/dozen.py > after.txt         # in the new one: diff before.txt after.txt

A line a run: SHA-256 of weights and averages, of the optimizer's state, and of the logged losses.
``--only "dit;unet"`` runs these alone. Words that follow are given to every run:
``data.split=count`` where the old checkout knew no other. Takes about four minutes.
"""

import csv
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
COMMON = (
    "trainer=cpu trainer.threads=1 trainer.max_steps=8 trainer.val_check_interval=4 "
    "trainer.log_every_n_steps=2 "
    "data.image_size=16 data.batch_size=8 data.holdout=0.2 sampler.steps=2 "
    "callbacks.checkpoint.every_n_train_steps=3 "
    "callbacks.samples.every_n_steps=8 callbacks.samples.n=4 "
)
CARS = COMMON + "data.source.n=60 "
DIT = "backbone=dit backbone.width=32 backbone.depth=2 backbone.heads=2 backbone.dropout=0.2 "
UNET = (
    "backbone=unet backbone.width=8 backbone.head_dim=8 backbone.multipliers=[1,2] "
    "backbone.attention=[False,True] "
    "backbone.blocks=1 backbone.dropout=0.2 "
)
RUNS = {
    "dit": CARS + DIT,
    "unet": CARS + UNET,
    "dit, global mixer": CARS + DIT + "backbone=aligned_dit backbone.global_units=4",
    "unet, four shards": CARS + UNET + "data.shards=4",
    "augmentation": CARS + DIT + "data.augment=0.5 data.rotate=true",
    "power averages": CARS + DIT + "ema=power learning_rate=linear",
    "alignment": CARS + DIT + "alignment=embedded alignment.encoder.seen=64",
    "ddp, two processes": CARS + DIT + "trainer.devices=2 data.shards=4 reduction=tree",
    "bfloat16, min-SNR": CARS
    + DIT
    + "trainer.precision=bf16-mixed target=noise schedule=linear objective=min_snr",
    "folder, two classes": COMMON + DIT + "data=folder data.root={images} data.crop=random",
    "folder, balanced fold": COMMON
    + DIT
    + "data=folder data.root={images} data.balance=1 data.folds=3 data.fold=2",
    "killed and resumed": CARS + DIT + "data.num_workers=1",
}


def main() -> None:
    """Train all, and print a line each."""
    chosen, overrides = [*RUNS], sys.argv[1:]
    if overrides[:1] == ["--only"]:
        chosen, overrides = overrides[1].split(";"), overrides[2:]
    with tempfile.TemporaryDirectory() as folder:
        tmp = Path(folder)
        draw(tmp / "images")
        for name in chosen:
            number = list(RUNS).index(name)
            given = RUNS[name].format(images=tmp / "images").split() + overrides
            train(tmp, str(number), given, kill="killed" in name)
            print(f"{name:24}", *digests(tmp / "runs" / str(number)), flush=True)


def draw(folder: Path) -> None:
    """Write thirty images of two classes, larger than they are trained on."""
    rng = np.random.default_rng(0)
    for k in range(30):
        file = folder / "ab"[k % 3 == 0] / f"{k:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 28, 3), dtype=np.uint8)).save(file)


def train(tmp: Path, name: str, words: list[str], *, kill: bool) -> None:
    """Train to the end, once killed at step 4 on the way."""
    paths = [f"paths.runs={tmp / 'runs'}", f"paths.cache={tmp / 'cache'}", f"name='{name}'"]
    command = [sys.executable, str(ROOT / "train.py"), *words, *paths]
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    if kill:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        metrics = tmp / "runs" / name / "metrics.csv"
        while process.poll() is None and not (metrics.exists() and "\n4," in metrics.read_text()):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} ended with {done.returncode}\n{done.stdout}{done.stderr}")


# Columns that the record had not always.
LATER_COLUMNS = ("train/lr",)

# Weights that were renamed are hashed under their first names, so that a digest stays what it was.
FIRST_NAMES = {
    "extra_averages": "others",
    "pos_embed": "place",
    "token_features.in_proj": "whole.compare",
    "token_features.hidden": "whole.think",
    "token_features.modulation": "whole.modulation",
    "token_features.out_proj": "whole.tell",
    "token_features.expand": "whole.spread",
}


def first_names(value: Any) -> Any:
    """Return a nested state with every name of a weight as it was first."""
    if isinstance(value, dict):
        return {first_names(name): first_names(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [first_names(inner) for inner in value]
    if not isinstance(value, str):
        return value
    for new, old in FIRST_NAMES.items():
        value = f".{value}.".replace(f".{new}.", f".{old}.")[1:-1]
    return value


def digests(run: Path) -> list[str]:
    """Hash what the newest checkpoint and the record hold: weights, optimizer, losses."""
    newest = max((run / "checkpoints").glob("step-*"))
    state = torch.load(newest / "state.ckpt", weights_only=True)
    parts = [digest(flat(first_names(state[part]))) for part in ("state_dict", "optimizer_states")]
    with (run / "metrics.csv").open(newline="") as file:
        rows = [
            {
                k: v
                for k, v in row.items()
                if v and not k.endswith("per_second") and k not in LATER_COLUMNS
            }
            for row in csv.DictReader(file)
        ]
    return [*parts, digest({str(i): sorted(row.items()) for i, row in enumerate(rows)})]


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves by their path."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: leaf for key, v in items for k, leaf in flat(v, f"{prefix}/{key}").items()}
    return {prefix: value}


def digest(leaves: dict[str, Any]) -> str:
    """The first 12 hexadecimal digits of the SHA-256 of named tensors and values."""
    total = hashlib.sha256()
    for name, value in sorted(leaves.items()):
        total.update(name.encode())
        if isinstance(value, torch.Tensor):
            total.update(f"{value.dtype} {tuple(value.shape)}".encode())
            value = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        total.update(value if isinstance(value, bytes) else repr(value).encode())
    return total.hexdigest()[:12]


if __name__ == "__main__":
    main()
