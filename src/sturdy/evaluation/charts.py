"""Line charts, drawn with Pillow alone."""

import math
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

COLOURS = ("#2f6fd0", "#e07b1f", "#3f9a5c", "#8a55b5", "#c8402f", "#555b66")
LEFT, TOP, RIGHT, BOTTOM = 66, 34, 16, 46


def chart(
    x: Sequence[float],
    lines: Mapping[str, Sequence[float]],
    *,
    title: str = "",
    across: str = "",
    size: tuple[int, int] = (720, 400),
) -> Image.Image:
    """``lines`` over ``x``, both on logarithmic scales; values that are not above 0 are left
    out.
    """
    image = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    values = [v for line in lines.values() for v in line if 0 < v < math.inf] or [1.0]
    low, high = min(values) / 1.2, max(values) * 1.2

    def place(px: float, py: float) -> tuple[float, float]:
        right = _part(px, min(x), max(x)) * (size[0] - LEFT - RIGHT)
        up = _part(py, low, high) * (size[1] - TOP - BOTTOM)
        return LEFT + right, size[1] - BOTTOM - up

    for mark in _marks(low, high):
        _, y = place(min(x), mark)
        pen.line([(LEFT, y), (size[0] - RIGHT, y)], fill="#e3e5ea")
        pen.text((LEFT - 8, y), f"{mark:g}", fill="black", font=font, anchor="rm")
    for mark in x:
        at, _ = place(mark, low)
        pen.line([(at, size[1] - BOTTOM), (at, size[1] - BOTTOM + 4)], fill="black")
        pen.text((at, size[1] - BOTTOM + 7), f"{mark:g}", fill="black", font=font, anchor="ma")
    pen.rectangle([LEFT, TOP, size[0] - RIGHT, size[1] - BOTTOM], outline="#8a8f99")
    pen.text((LEFT, 10), title, fill="black", font=ImageFont.load_default(14))
    pen.text(((LEFT + size[0]) / 2, size[1] - 6), across, fill="black", font=font, anchor="mb")
    for i, (name, line) in enumerate(lines.items()):
        colour = COLOURS[i % len(COLOURS)]
        points = [place(px, py) for px, py in zip(x, line, strict=True) if 0 < py < math.inf]
        pen.line(points, fill=colour, width=2)
        for px, py in points:
            pen.ellipse([px - 3, py - 3, px + 3, py + 3], fill=colour)
        pen.text((LEFT + 12, TOP + 8 + 18 * i), name, fill=colour, font=font)
    return image


def _part(value: float, low: float, high: float) -> float:
    """Where ``value`` is from ``low`` (0) to ``high`` (1), on a logarithmic scale."""
    return math.log(value / low) / math.log(high / low) if high > low else 0.5


def _marks(low: float, high: float) -> list[float]:
    """Round numbers from ``low`` to ``high``."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    marks = [m * 10.0**e for e in decades for m in ((1, 2, 5) if len(decades) < 5 else (1,))]
    return [m for m in marks if low <= m <= high]
