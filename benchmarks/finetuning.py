"""Measure what fine-tuning costs, on a tiny base: python benchmarks/finetuning.py

A tiny Stable Diffusion with random weights, images of 64 pixels, one thread; in turns. The ratios
of a real base differ: its autoencoder and its text encoder weigh less beside its network.
"""

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from sharding import Groups, compare

from examples.tiny_sd.build import build

IMAGES, STEPS, EVERY = 64, 30, 5
ADAPTER = ["lora.rank=16"]
RUN = [
    "experiment=finetune",
    "trainer=cpu",
    "trainer.threads=1",
    f"trainer.max_steps={STEPS}",
    f"trainer.val_check_interval={STEPS}",
    "trainer.limit_val_batches=1",
    f"trainer.log_every_n_steps={EVERY}",
    "data.image_size=64",
    "data.batch_size=8",
    "data.caption=a photo",
    "callbacks.checkpoint.every_n_train_steps=null",
    "callbacks.samples.every_n_steps=null",
]
GROUPS: Groups = {
    "all weights": {
        "cached latents": [],
        "live latents": ["space.cached=false"],
        "gradient checkpointing": ["backbone.checkpoint=true"],
        "adapter of rank 16": ADAPTER,
    },
}


def main() -> None:
    draw = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        (directory / "images").mkdir()
        for k in range(IMAGES):
            image = Image.fromarray(draw.integers(0, 256, (64, 64, 3), dtype=np.uint8))
            image.save(directory / "images" / f"{k}.png")
        build(directory / "base")
        words = [f"base={directory / 'base'}", f"data.root={directory / 'images'}"]
        compare([*RUN, *words], GROUPS, directory)


if __name__ == "__main__":
    main()
