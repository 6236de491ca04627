"""Measure what features notice: python benchmarks/features.py [FOLDER] [--n 800]

Puts damaged real images in the place of samples, and prints their KID against the held-out images,
in the features ``embedded`` and ``efficientnet``. *Above the floor* is the difference from the KID
of undamaged images, in standard errors of that difference: from 3 on, the damage is noticed.

Without FOLDER the images are the drawn cars. Results are kept in --cache: a second call goes on.
"""

import argparse
import io
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from exact_resume.randomness import generator
from examples.cars.source import Cars
from sturdy.data.datamodule import ImageData, folder_data
from sturdy.encoders.images import ImageSet
from sturdy.evaluation.distances import kid, manifold
from sturdy.evaluation.features import EfficientNet, Embedded, Features
from sturdy.evaluation.reference import load_reference_images

CARS = 8000
MISSING = {  # row: (attribute, options that are left out)
    "without limousines (2 %)": ("body", ["limousine"]),
    "without buses": ("body", ["bus"]),
    "without red ones": ("paint", ["red"]),
    "all driving to the right": ("direction", ["left"]),
    "no night": ("light", ["night"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="images, a folder a class")
    parser.add_argument("--n", type=int, default=800, help="images in the place of samples")
    parser.add_argument(
        "--pool", type=int, help="undamaged images to choose from; 2 n if not given"
    )
    parser.add_argument("--size", type=int, default=32, help="height and width")
    parser.add_argument("--cache", type=Path, default=Path("cache"))
    args = parser.parse_args()
    data = open_data(args.folder, args.size, str(args.cache))
    reference = load_reference_images(data, Embedded(), 20_000, args.cache)
    order = torch.randperm(len(reference.train), generator=generator("stand-ins"))
    pool = reference.train[order[: args.pool or 2 * args.n]]
    columns = []
    for features in (Embedded(), EfficientNet()):
        features.prepare(
            reference.train.pixels,
            reference.train.answers["class"] if args.folder else reference.train.labels,
            len(data.classes),
            data=reference.cache_key,
            folder=reference.cache_folder,
            tell=lambda done, total: None,
        )
        begin = time.process_time()
        columns.append(measure(features, reference, pool, args.n))
        print(f"{features.name}: {time.process_time() - begin:.0f} CPU seconds", flush=True)
    print(f"\n{args.n} images against {len(reference.held_out)} held-out images\n")
    print("| Instead of samples | embedded | above the floor | precision, recall |", end="")
    print(" efficientnet | above the floor | precision, recall |")
    print("|---|---|---|---|---|---|---|")
    for name in columns[0]:
        cells = [cell for column in columns for cell in column[name]]
        print(f"| {name} | {' | '.join(cells)} |")


def open_data(folder: Path | None, size: int, cache: str) -> ImageData:
    if folder is None:
        source = Cars(n=CARS, size=size)
        data = ImageData(source=source, image_size=size, batch_size=64, cache=cache)
    else:
        data = folder_data(root=str(folder), image_size=size, batch_size=64, cache=cache)
    data.open()
    return data


def measure(
    features: Features, reference, pool: ImageSet, n: int
) -> dict[str, tuple[str, str, str]]:
    """Return KID, how far it is above the floor, and precision and recall, by row."""
    extract = partial(features.extract_cached, folder=reference.cache_folder)
    key = reference.cache_key
    real = extract(reference.held_out.pixels, data=(*key, "held-out"))
    undamaged = extract(pool.pixels, data=(*key, len(pool), "pool"))
    rows = {"other real images": undamaged[:n]}
    for name, damage in DAMAGES.items():
        rows[name] = extract(damage(pool.pixels[:n]), data=(*key, n, name))
    for name, kept in without(reference, pool).items():
        rows[name] = undamaged[kept][:n]
    rows["100 images, repeated"] = undamaged[torch.arange(n) % 100]
    rows["one image, repeated"] = undamaged[:1].expand(n, -1)
    floor, floor_error = kid(real, rows["other real images"])
    results = {}
    for name, fake in rows.items():
        value, error = kid(real, fake)
        shares = manifold(real, fake)
        above = (value - floor) / math.hypot(error, floor_error)
        results[name] = (
            f"{value:.4f} ± {error:.4f}",
            "" if name == "other real images" else f"{above:+.1f}",
            f"{shares.precision:.2f}, {shares.recall:.2f}",
        )
    return results


def without(reference, pool: ImageSet) -> dict[str, Tensor]:
    """Return which images are kept, ``(n,)``, by row."""
    rows = {}
    options = reference.options
    for name, (attribute, left_out) in MISSING.items():
        if attribute in options:
            numbers = [list(options[attribute]).index(option) for option in left_out]
            rows[name] = ~torch.isin(pool.answers[attribute], torch.tensor(numbers))
    if "body" not in options and "class" in options:
        for number, name in enumerate(options["class"]):
            rows[f"without the class {name}"] = pool.answers["class"] != number
    return rows


def noisy(pixels: Tensor, *, levels: float) -> Tensor:
    noise = torch.randn(pixels.shape, generator=generator("damage"))
    return as_pixels(pixels + levels * noise)


def blurred(pixels: Tensor) -> Tensor:
    padded = F.pad(pixels.float(), (1, 1, 1, 1), mode="replicate")
    return as_pixels(F.avg_pool2d(padded, 3, 1))


def halved(pixels: Tensor) -> Tensor:
    small = F.avg_pool2d(pixels.float(), 2)
    return as_pixels(F.interpolate(small, pixels.shape[2:], mode="bicubic"))


def jpeg(pixels: Tensor, *, quality: int) -> Tensor:
    images = []
    for image in pixels.permute(0, 2, 3, 1).numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        images.append(torch.from_numpy(np.array(Image.open(file))))
    return torch.stack(images).permute(0, 3, 1, 2)


def shifted(pixels: Tensor) -> Tensor:
    return F.pad(pixels.float(), (2, 0, 0, 0), mode="replicate")[..., :-2].to(torch.uint8)


def in_wrong_order(pixels: Tensor) -> Tensor:
    """Exchange the four quarters of each image, so that every small part of it is real."""
    half = pixels.shape[-1] // 2
    return pixels.roll((half, half), (2, 3))


def warmer(pixels: Tensor) -> Tensor:
    return as_pixels(pixels * torch.tensor([1.05, 1, 0.95])[:, None, None])


def as_pixels(values: Tensor) -> Tensor:
    return values.round().clamp(0, 255).to(torch.uint8)


DAMAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "noise of 2 grey levels": partial(noisy, levels=2),
    "noise of 8 grey levels": partial(noisy, levels=8),
    "blurred, 3 x 3": blurred,
    "half the size and back": halved,
    "JPEG of quality 50": partial(jpeg, quality=50),
    "5 % more red, 5 % less blue": warmer,
    "shifted by two pixels": shifted,
    "mirrored": lambda pixels: pixels.flip(-1),
    "quarters exchanged": in_wrong_order,
}

if __name__ == "__main__":
    main()
