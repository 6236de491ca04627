"""Pictures as people look at them: float tensors to PNG files, one or a grid."""

import math
import os
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor


def to_uint8(images: Tensor) -> Tensor:
    """``(b, c, h, w)`` in [-1, 1] (clipped) to uint8 ``(b, h, w, c)``, rounded to the nearest
    level.
    """
    levels = images.detach().float().clamp(-1, 1).add(1).mul(127.5).round()
    return levels.to(torch.uint8).permute(0, 2, 3, 1).cpu().contiguous()


def grid(
    images: Tensor, *, columns: int | None = None, tile: int = 64, gap: int = 2
) -> Image.Image:
    """One picture of all ``images`` ``(b, c, h, w)``, row by row.

    Args:
        columns: pictures a row; by default about as many as rows.
        tile: small pictures are magnified by a whole factor to at least this many pixels.
        gap: white pixels between tiles.
    """
    pixels = to_uint8(images)
    b, h, w, _ = pixels.shape
    columns = columns or math.ceil(math.sqrt(b))
    scale = max(1, math.ceil(tile / max(h, w)))
    height, width = scale * h + gap, scale * w + gap
    sheet = Image.new(
        "RGB", (columns * width + gap, math.ceil(b / columns) * height + gap), "white"
    )
    for i, picture in enumerate(pixels):
        image = Image.fromarray(picture.numpy()).resize(
            (scale * w, scale * h), Image.Resampling.NEAREST
        )
        sheet.paste(image, (i % columns * width + gap, i // columns * height + gap))
    return sheet


def class_columns(n: int, classes: int) -> int | None:
    """Columns for ``n`` pictures whose classes take turns, so that a column is a class; None if any
    number will do.
    """
    return classes * max(1, round(math.sqrt(n) / classes)) if 1 < classes <= 16 else None


def save_png(image: Image.Image, path: Path) -> None:
    """Write ``path`` whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")  # another process may write the same
    image.save(aside, format="PNG")
    os.replace(aside, path)
