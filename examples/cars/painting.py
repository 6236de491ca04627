"""A canvas for flat shapes and gradients, antialiased by supersampling.

    pixel = mean of the factor x factor subpixels under it

Lengths are in image heights and ``y`` points up. Corners are rounded to subpixels and colours to
integers before anything is painted, so rounding errors do not reach the image.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[int, ...]  # (red, green, blue, opacity), 0 to 255
Path = np.ndarray | Sequence[tuple[float, float]]  # corners (x, y), as an array (n, 2)


def rgb(code: str) -> Colour:
    """Return the opaque colour written as ``"d94f3d"``."""
    return (*bytes.fromhex(code), 255)


WHITE = rgb("ffffff")


def mix(a: Colour, b: Colour, share: float) -> Colour:
    """Return ``a`` with a ``share`` of ``b``."""
    return tuple(round(x + (y - x) * share) for x, y in zip(a, b, strict=True))


def fade(colour: Colour, opacity: int) -> Colour:
    """Return the colour with another opacity."""
    return (*colour[:3], opacity)


@lru_cache(maxsize=256)
def path(text: str) -> np.ndarray:
    """Return the closed path through corners ``"x,y"`` or ``"x,y,radius"``, ``(n, 2)``.

    The text is in thousandths, the result in units.

    A corner with a radius is rounded by a quadratic Bezier curve from one of its sides to the
    other.
    """
    corners = (
        np.array([(*map(int, c.split(",")), 0)[:3] for c in text.split()], dtype=np.float64) / 1000
    )
    points, out = corners[:, :2], []
    for here, before, after, radius in zip(
        points, np.roll(points, 1, 0), np.roll(points, -1, 0), corners[:, 2], strict=True
    ):
        if radius == 0:
            out.append(here)
            continue
        a, b = (
            here + (p - here) * min(0.5, radius / np.sqrt(((p - here) ** 2).sum()))
            for p in (before, after)
        )
        out += [(1 - t) ** 2 * a + 2 * t * (1 - t) * here + t**2 * b for t in np.arange(9) / 8]
    shared = np.stack(out)
    shared.setflags(write=False)
    return shared


class Canvas:
    """An image that is being painted.

    Args:
        size: height of the finished image in pixels.
        wide: its width in heights.
    """

    def __init__(self, size: int, *, wide: float = 1.0) -> None:
        self.factor = max(2, min(4, 1024 // size), 192 // size)  # small images need finer edges
        self.side = size * self.factor
        self.move()
        self._aim(Image.new("RGB", (round(wide * self.side), self.side)))

    def part(self, x: float) -> "Canvas":
        """Return the square from ``x`` on, as another canvas."""
        left, square = round(x * self.side), copy(self)
        square._aim(self._image.crop((left, 0, left + self.side, self.side)))
        return square

    def move(self, x: float = 0.0, y: float = 0.0, scale: float = 1.0) -> None:
        """Put the origin at ``(x, y)`` of the image, whose lower left corner is (0, 0)."""
        self._origin = (x * self.side, (1.0 - y) * self.side)
        self._scale = (scale * self.side, -scale * self.side)

    def mirror(self) -> None:
        """Swap left and right of everything painted so far."""
        self._aim(self._image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))

    def polygon(self, path: Path, colour: Colour) -> None:
        """Fill a closed path."""
        self._brush.polygon(self._corners(path), colour)

    def box(self, left: float, low: float, wide: float, high: float, colour: Colour) -> None:
        """Fill a rectangle."""
        (x0, y1), (x1, y0) = self._point(left, low), self._point(left + wide, low + high)
        self._brush.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), colour)

    def line(self, path: Path, colour: Colour, width: float, *, closed: bool = False) -> None:
        """Draw along a path."""
        corners = self._corners(path)
        self._brush.line(corners + corners[: 2 * closed], colour, self._length(width), "curve")

    def disc(self, x: float, y: float, radius: float, colour: Colour, flat: float = 1.0) -> None:
        """Fill a disc, or an ellipse whose height is ``flat`` of its width."""
        cx, cy, rx, ry = *self._point(x, y), self._length(radius), self._length(radius * flat)
        self._brush.ellipse((cx - rx, cy - ry, cx + rx - 1, cy + ry - 1), colour)

    def glow(
        self,
        x: float,
        y: float,
        radius: float,
        colour: Colour,
        *,
        flat: float = 1.0,
        rings: int = 5,
    ) -> None:
        """Paint a soft disc: ``rings`` translucent discs, one upon the other."""
        for ring in range(rings, 0, -1):
            self.disc(x, y, radius * ring / rings, colour, flat)

    def gradient(self, top: float, bottom: float, *colours: Colour) -> None:
        """Fill the full width between two heights, from the first colour down to the last."""
        y0, y1 = self._point(0.0, top)[1], self._point(0.0, bottom)[1]
        rows, table = max(1, y1 - y0), np.array([colour[:3] for colour in colours])
        stop, rest = np.divmod(np.arange(rows)[:, None] * (len(colours) - 1), rows)
        here, after = table[stop[:, 0]], table[stop[:, 0] + 1]
        column = Image.fromarray((here + (after - here) * rest // rows).astype(np.uint8)[:, None])
        self._image.paste(
            column.resize((self._image.width, rows), Image.Resampling.NEAREST), (0, y0)
        )

    @contextmanager
    def inside(self, *paths: Path) -> Iterator[None]:
        """Clip the painting in this block to ``paths``."""
        below, mask = self._image, Image.new("L", self._image.size)
        stencil = ImageDraw.Draw(mask)
        for path in paths:
            stencil.polygon(self._corners(path), 255)
        self._aim(below.copy())
        yield
        below.paste(self._image, mask=mask)
        self._aim(below)

    def pixels(self) -> np.ndarray:
        """Return the finished image, uint8 ``(3, size, wide * size)``."""
        return np.ascontiguousarray(np.asarray(self._image.reduce(self.factor)).transpose(2, 0, 1))

    def _aim(self, image: Image.Image) -> None:
        self._image, self._brush = image, ImageDraw.Draw(image, "RGBA")

    def _point(self, x: float, y: float) -> tuple[int, int]:
        return round(x * self._scale[0] + self._origin[0]), round(
            y * self._scale[1] + self._origin[1]
        )

    def _corners(self, path: Path) -> list[int]:
        subpixels = (
            np.asarray(path) * self._scale + self._origin - 0.5
        )  # Pillow counts their centres
        return np.rint(subpixels).astype(np.int64).ravel().tolist()

    def _length(self, length: float) -> int:
        return max(1, round(length * self._scale[0]))
