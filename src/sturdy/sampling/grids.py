"""Float tensors as PNG files: one image, or a grid of many."""

import math
from pathlib import Path

from PIL import Image
from torch import Tensor

from exact_resume.files import atomic_write
from sturdy.encoders.images import unscaled


def to_uint8(images: Tensor) -> Tensor:
    """Clip ``(b, c, h, w)`` to [-1, 1] and round it to uint8 ``(b, h, w, c)``."""
    return unscaled(images.detach()).permute(0, 2, 3, 1).cpu().contiguous()


def grid(
    images: Tensor, *, columns: int | None = None, tile: int = 64, gap: int = 2
) -> Image.Image:
    """Arrange ``images`` ``(b, c, h, w)`` in one RGB image, row by row.

    Args:
        images: in [-1, 1].
        columns: images in a row; by default about as many as rows.
        tile: small images are magnified by an integer to at least this many pixels.
        gap: white pixels between tiles.
    """
    tiles = [as_image(pixels) for pixels in to_uint8(images)]
    b = len(tiles)
    w, h = tiles[0].size
    columns = columns or math.ceil(math.sqrt(b))
    rows = math.ceil(b / columns)
    scale = max(1, math.ceil(tile / max(h, w)))
    height = scale * h + gap
    width = scale * w + gap
    sheet = Image.new("RGB", (columns * width + gap, rows * height + gap), "white")
    for i, image in enumerate(tiles):
        image = image.resize((scale * w, scale * h), Image.Resampling.NEAREST)
        sheet.paste(image, (i % columns * width + gap, i // columns * height + gap))
    return sheet


def as_image(pixels: Tensor) -> Image.Image:
    """Return an image of uint8 ``(h, w, c)``: RGB if c is 3, else grey, its channels side by side.

    So images of one channel are grey.
    """
    if pixels.shape[2] == 3:
        return Image.fromarray(pixels.numpy())
    return Image.fromarray(pixels.transpose(1, 2).flatten(1).numpy())


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
