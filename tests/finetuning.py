"""A tiny Stable Diffusion, captioned images, and the words of a run that fine-tunes it."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from examples.tiny_sd.build import build

CAPTIONS = ["a red car", "a blue car", "a red car, at night", "two cars", ""]
STEPS = 6
WORDS = [
    "experiment=finetune",
    "trainer=cpu",
    "trainer.threads=1",
    f"trainer.max_steps={STEPS}",
    "trainer.val_check_interval=3",
    "trainer.limit_val_batches=1",
    "trainer.log_every_n_steps=1",
    "data.image_size=64",
    "data.batch_size=4",
    "data.holdout=0.2",
    "data.split=count",
    "learning_rate.warmup=0",
    "optimizer.lr=1e-3",
    "sampler.steps=2",
    "callbacks.checkpoint.every_n_train_steps=2",
    "callbacks.samples.every_n_steps=null",
]
LORA = ["lora.rank=16", "lora.dropout=0.2"]
LIVE = ["space.cached=false"]


def make_images(folder: Path, n: int = 20) -> None:
    """Write ``n`` images with captions in ``metadata.jsonl``."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    rows = []
    for k in range(n):
        coarse = Image.fromarray(draw.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((72, 64), Image.Resampling.BICUBIC).save(folder / f"{k:02}.png")
        row = {"file_name": f"{k:02}.png", "text": CAPTIONS[k % len(CAPTIONS)]}
        rows.append(json.dumps(row) + "\n")
    (folder / "metadata.jsonl").write_text("".join(rows))


def prepare(tmp: Path, family: str = "sd1") -> list[str]:
    """Make images and a base under ``tmp``; return the words of a run on them."""
    make_images(tmp / "images")
    build(tmp / family, family)
    return [*WORDS, f"base={tmp / family}", f"data.root={tmp / 'images'}"]
