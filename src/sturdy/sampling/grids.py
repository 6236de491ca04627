"""Float tensors as PNG files: one image, or a grid of many."""

import math
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from exact_resume.files import atomic_write


def to_uint8(images: Tensor) -> Tensor:
    """Clip ``(b, c, h, w)`` to [-1, 1] and round it to uint8 ``(b, h, w, c)``."""
    levels = images.detach().float().clamp(-1, 1).add(1).mul(127.5).round()
    return levels.to(torch.uint8).permute(0, 2, 3, 1).cpu().contiguous()


def grid(
    images: Tensor, *, columns: int | None = None, tile: int = 64, gap: int = 2
) -> Image.Image:
    """Arrange ``images`` ``(b, c, h, w)`` in one image, row by row.

    Args:
        images: in [-1, 1].
        columns: images in a row; by default about as many as rows.
        tile: small images are magnified by an integer to at least this many pixels.
        gap: white pixels between tiles.
    """
    pixels = to_uint8(images)
    b, h, w, _ = pixels.shape
    columns = columns or math.ceil(math.sqrt(b))
    rows = math.ceil(b / columns)
    scale = max(1, math.ceil(tile / max(h, w)))
    height = scale * h + gap
    width = scale * w + gap
    sheet = Image.new("RGB", (columns * width + gap, rows * height + gap), "white")
    for i, one in enumerate(pixels):
        image = Image.fromarray(one.numpy())
        image = image.resize((scale * w, scale * h), Image.Resampling.NEAREST)
        sheet.paste(image, (i % columns * width + gap, i // columns * height + gap))
    return sheet


def class_columns(n: int, classes: int) -> int | None:
    """Return columns for ``n`` images whose classes take turns, such that a column is one class.

    None if there are no classes or too many.
    """
    return classes * max(1, round(math.sqrt(n) / classes)) if 1 < classes <= 16 else None


def save_png(image: Image.Image, path: Path) -> None:
    """Write ``path`` completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, durable=False, unique=True) as file:
        image.save(file, format="PNG")
