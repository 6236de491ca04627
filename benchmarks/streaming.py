"""Measure how fast images are read from shards: python benchmarks/streaming.py [images] [side]

The same images are read from a folder's cache and from shards, at random positions as training
does, with 0 and 2 data workers, with the pages of all files in memory. Prints images a second, the
ratio to the cache, and what each keeps on the disk. The best of a few rounds in turns counts.
"""

import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sturdy.data.datamodule import ImageData, folder_data
from sturdy.data.shards import main as shards
from sturdy.data.stream import StreamData

SIZE, BATCH, ROUNDS = 64, 32, 3


class Start:
    """As much of a trainer as the data asks for."""

    global_step = 0


def draw(root: Path, images: int, side: int) -> None:
    """Write smooth JPEGs, 4 by 3."""
    root.mkdir()
    for k in range(images):
        coarse = np.random.default_rng(k).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((side, side * 3 // 4), Image.Resampling.BICUBIC)
        image.save(root / f"{k:06d}.jpg", quality=90)


def rate(data: ImageData, workers: int, batches: int) -> float:
    """Images a second, after a warm start."""
    data.num_workers = workers
    stream = iter(data.train_dataloader())
    for _ in range(4):
        next(stream)
    start = time.perf_counter()
    for _ in range(batches):
        next(stream)
    return batches * BATCH / (time.perf_counter() - start)


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def measure(images: int, side: int, tmp: Path) -> None:
    draw(tmp / "photos", images, side)
    start = time.perf_counter()
    assert shards(["pack", str(tmp / "photos"), str(tmp / "shards")]) == 0
    made = time.perf_counter() - start
    print(f"packing, decoding and indexing: {images / made:,.0f} images a second")
    options = {"image_size": SIZE, "batch_size": BATCH, "flip": True}
    found: dict[str, ImageData] = {}
    for name, kind, root in (
        ("cache", folder_data, "photos"),
        ("shards", StreamData, "shards"),
    ):
        data = kind(root=str(tmp / root), cache=str(tmp / f"{name}-list"), **options)
        data.trainer = Start()  # type: ignore[assignment]
        start = time.perf_counter()
        data.open()
        first = time.perf_counter() - start
        on_disk = size(tmp / f"{name}-list") / images
        print(f"{name}: first start {first:.2f} s, {on_disk:,.0f} bytes an image in the cache")
        found[name] = data
    for workers in (0, 2):
        rates: dict[str, list[float]] = {name: [] for name in found}
        for _ in range(ROUNDS):  # in turns, so that both get the same machine
            for name, data in found.items():
                rates[name].append(rate(data, workers, max(8, images // BATCH)))
        best = {name: max(values) for name, values in rates.items()}
        print(
            f"{workers} workers: cache {best['cache']:,.0f}, shards {best['shards']:,.0f} images a "
            f"second; ratio {best['shards'] / best['cache']:.3f}"
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = [int(word) for word in sys.argv[1:]]
    directory = Path(tempfile.mkdtemp())
    try:
        measure(*([*given, *(1000, 400)[len(given) :]]), directory)
    finally:
        shutil.rmtree(directory)
