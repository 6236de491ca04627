"""Measure what fine-tuning costs: python benchmarks/finetuning.py [--real-size]

A tiny Stable Diffusion with random weights, images of 64 pixels, one thread; in turns. With
``--real-size`` the network of Stable Diffusion 1 instead (860 million weights, 12 GB of memory):
forward and backward pass of one image of 256 pixels, without an optimizer.
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sharding import Groups, compare

from examples.tiny_sd.build import build
from sturdy.pretrained.borrowed import Borrowed

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


LORA = {"rank": 16, "alpha": None, "targets": ["to_q", "to_k", "to_v", "to_out.0"], "dropout": 0.0}
REAL_SIZE = {
    "all weights": {},
    "gradient checkpointing": {"checkpoint": True},
    "adapter of rank 16": {"base": {"path": "random", "sha256": "none"}, "lora": LORA},
}


def real_size() -> None:
    torch.set_num_threads(1)
    config = {"cross_attention_dim": 768}
    first = 0.0
    for way, options in REAL_SIZE.items():
        network = Borrowed(network="UNet2DConditionModel", config=config, **options).train()
        network.is_base_loaded = True  # with random weights
        seconds = []
        for _ in range(2):
            start = time.process_time()
            out = network(torch.randn(1, 4, 32, 32), torch.tensor([0.5]), torch.randn(1, 77, 768))
            out.square().mean().backward()
            seconds.append(time.process_time() - start)
            network.zero_grad()
        first = first or min(seconds)
        print(f"    {way:22} {min(seconds):7.1f} CPU s   x {min(seconds) / first:.2f}", flush=True)
        del network, out


def main() -> None:
    if "--real-size" in sys.argv:
        real_size()
        return
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
