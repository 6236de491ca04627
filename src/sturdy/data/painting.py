"""A small painter and the scenes it knows: flat shapes and gradients, antialiased by supersampling.

    pixel = mean of the factor x factor subpixels under it

Lengths are in picture heights and ``y`` points up. Corners are rounded to whole subpixels and colours are
whole numbers before anything is painted, so rounding errors do not reach the picture.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[int, ...]  # (red, green, blue, opacity), 0 to 255
Path = np.ndarray | Sequence[tuple[float, float]]  # corners (x, y), as an array (n, 2)


def rgb(code: str) -> Colour:
    """The opaque colour written as ``"d94f3d"``."""
    return (*bytes.fromhex(code), 255)


def mix(a: Colour, b: Colour, share: float) -> Colour:
    """``a`` with a ``share`` of ``b`` in it."""
    return tuple(round(x + (y - x) * share) for x, y in zip(a, b, strict=True))


def fade(colour: Colour, opacity: int) -> Colour:
    """The same colour, translucent."""
    return (*colour[:3], opacity)


@lru_cache(maxsize=256)
def path(text: str) -> np.ndarray:
    """The closed path through corners ``"x,y"`` or ``"x,y,radius"``, in thousandths; ``(n, 2)``.

    A corner with a radius is rounded by a quadratic Bezier curve from one of its sides to the other.
    """
    corners = np.array([(*map(int, c.split(",")), 0)[:3] for c in text.split()], dtype=np.float64) / 1000
    points, out = corners[:, :2], []
    for here, before, after, radius in zip(
        points, np.roll(points, 1, 0), np.roll(points, -1, 0), corners[:, 2], strict=True
    ):
        if radius == 0:
            out.append(here)
            continue
        a, b = (here + (p - here) * min(0.5, radius / np.sqrt(((p - here) ** 2).sum())) for p in (before, after))
        out += [(1 - t) ** 2 * a + 2 * t * (1 - t) * here + t**2 * b for t in np.arange(9) / 8]
    shared = np.stack(out)
    shared.setflags(write=False)
    return shared


class Canvas:
    """A picture under the brush.

    Args:
        size: height of the finished picture in pixels.
        wide: its width in heights.
    """

    def __init__(self, size: int, *, wide: float = 1.0) -> None:
        self.factor = max(2, min(4, 1024 // size), 192 // size)  # small pictures need the finer edges
        self.side = size * self.factor
        self.move()
        self._aim(Image.new("RGB", (round(wide * self.side), self.side)))

    def part(self, x: float) -> "Canvas":
        """The square from ``x`` on, as a canvas of its own."""
        left, square = round(x * self.side), copy(self)
        square._aim(self._image.crop((left, 0, left + self.side, self.side)))
        return square

    def move(self, x: float = 0.0, y: float = 0.0, scale: float = 1.0) -> None:
        """From here on (0, 0) lies at ``(x, y)`` of the picture, whose own (0, 0) is below on the left."""
        self._origin = (x * self.side, (1.0 - y) * self.side)
        self._scale = (scale * self.side, -scale * self.side)

    def mirror(self) -> None:
        """Swap left and right of what is painted so far."""
        self._aim(self._image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))

    def polygon(self, path: Path, colour: Colour) -> None:
        self._brush.polygon(self._corners(path), colour)

    def box(self, left: float, low: float, wide: float, high: float, colour: Colour) -> None:
        (x0, y1), (x1, y0) = self._point(left, low), self._point(left + wide, low + high)
        self._brush.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), colour)

    def line(self, path: Path, colour: Colour, width: float, *, closed: bool = False) -> None:
        corners = self._corners(path)
        self._brush.line(corners + corners[: 2 * closed], colour, self._length(width), "curve")

    def disc(self, x: float, y: float, radius: float, colour: Colour, flat: float = 1.0) -> None:
        """A disc, or an ellipse whose height is ``flat`` of its width."""
        cx, cy, rx, ry = *self._point(x, y), self._length(radius), self._length(radius * flat)
        self._brush.ellipse((cx - rx, cy - ry, cx + rx - 1, cy + ry - 1), colour)

    def glow(self, x: float, y: float, radius: float, colour: Colour, *, flat: float = 1.0, rings: int = 5) -> None:
        """A soft disc: ``rings`` discs of a translucent ``colour``, one upon the other."""
        for ring in range(rings, 0, -1):
            self.disc(x, y, radius * ring / rings, colour, flat)

    def gradient(self, top: float, bottom: float, *colours: Colour) -> None:
        """Fill the whole width between two heights, from the first colour above to the last below."""
        y0, y1 = self._point(0.0, top)[1], self._point(0.0, bottom)[1]
        rows, table = max(1, y1 - y0), np.array([colour[:3] for colour in colours])
        stop, rest = np.divmod(np.arange(rows)[:, None] * (len(colours) - 1), rows)
        here, after = table[stop[:, 0]], table[stop[:, 0] + 1]
        column = Image.fromarray((here + (after - here) * rest // rows).astype(np.uint8)[:, None])
        self._image.paste(column.resize((self._image.width, rows), Image.Resampling.NEAREST), (0, y0))

    @contextmanager
    def inside(self, *paths: Path) -> Iterator[None]:
        """What is painted in this block shows only inside ``paths``."""
        below, mask = self._image, Image.new("L", self._image.size)
        stencil = ImageDraw.Draw(mask)
        for path in paths:
            stencil.polygon(self._corners(path), 255)
        self._aim(below.copy())
        yield
        below.paste(self._image, mask=mask)
        self._aim(below)

    def pixels(self) -> np.ndarray:
        """The finished picture, uint8 ``(3, size, wide * size)``."""
        return np.ascontiguousarray(np.asarray(self._image.reduce(self.factor)).transpose(2, 0, 1))

    def _aim(self, image: Image.Image) -> None:
        self._image, self._brush = image, ImageDraw.Draw(image, "RGBA")

    def _point(self, x: float, y: float) -> tuple[int, int]:
        return round(x * self._scale[0] + self._origin[0]), round(y * self._scale[1] + self._origin[1])

    def _corners(self, path: Path) -> list[int]:
        subpixels = np.asarray(path) * self._scale + self._origin - 0.5  # Pillow counts their centres
        return np.rint(subpixels).astype(np.int64).ravel().tolist()

    def _length(self, length: float) -> int:
        return max(1, round(length * self._scale[0]))


@dataclass(frozen=True)
class Light:
    """What the time of day does to the sky and to colours."""

    sky: tuple[Colour, ...]  # from the zenith to the horizon
    tint: Colour  # a white wall under this light
    lamp: Colour  # sun or moon
    at: tuple[float, float]  # where that stands
    radius: float  # of its disc
    lit: int = 0  # how bright lamps are, 0 to 255
    clouds: bool = False
    stars: bool = False

    def on(self, colour: Colour, haze: float = 0.0) -> Colour:
        """``colour`` out there; ``haze`` 0 is close by and 1 as far as the horizon."""
        return mix(tuple(c * t // 255 for c, t in zip(colour, self.tint, strict=True)), self.sky[-1], haze)

    def near(self, colour: Colour) -> Colour:
        """``colour`` on the road, where street lamps take two thirds of the night away."""
        return tuple(c * (510 + t) // 765 for c, t in zip(colour, self.tint, strict=True))


LIGHTS = {
    "day": Light(
        sky=(rgb("3f9be0"), rgb("8fcbf0"), rgb("e3f3f6")),
        tint=rgb("ffffff"), lamp=rgb("fff6d0"), at=(0.80, 0.84), radius=0.065, clouds=True,
    ),
    "dusk": Light(
        sky=(rgb("4a3a78"), rgb("c0628a"), rgb("f79a6b"), rgb("ffd08a")),
        tint=rgb("e8bcb4"), lamp=rgb("fff0b8"), at=(0.74, 0.62), radius=0.085, lit=150,
    ),
    "night": Light(
        sky=(rgb("0b1230"), rgb("182452"), rgb("45559a")),
        tint=rgb("6a78a8"), lamp=rgb("f3efd8"), at=(0.20, 0.84), radius=0.065, lit=255, stars=True,
    ),
}  # fmt: skip
WHITE = rgb("ffffff")


def sky(canvas: Canvas, light: Light) -> None:
    x, y = light.at
    canvas.gradient(1.0, 0.36, *light.sky)
    for i in range(34 * light.stars):  # a sequence that leaves no gaps and makes no rows
        across, up = i * 0.754878 % 1.3, 0.50 + i * 0.569840 % 0.5
        canvas.disc(across, up, 0.008 if i % 4 == 0 else 0.005, fade(light.lamp, 200))
    canvas.glow(x, y, 0.24, fade(light.lamp, 8), rings=16)
    canvas.disc(x, y, light.radius, light.lamp)
    for dx, dy, radius in (
        (-0.02, 0.02, 0.016),
        (0.022, 0.008, 0.011),
        (-0.004, -0.028, 0.013),
    ) * light.stars:
        canvas.disc(x + dx, y + dy, radius, mix(light.lamp, light.sky[-1], 0.25))
    for across, up, size in ((0.20, 0.88, 0.075), (0.52, 0.76, 0.05), (1.08, 0.92, 0.06)) * light.clouds:
        for dx, wide in ((-1.1, 0.6), (0.0, 1.0), (1.15, 0.7)):
            canvas.disc(across + dx * size, up + 0.35 * wide * size, wide * size, fade(WHITE, 215), 0.62)


def city(canvas: Canvas, light: Light) -> None:
    far, near = light.on(rgb("8fa3bd"), 0.45), light.on(rgb("5f7391"), 0.10)
    window = mix(light.on(rgb("b9cfe2")), rgb("ffd98a"), light.lit / 255)
    for i, height in enumerate((62, 78, 56, 70, 88, 60, 74, 66, 82, 58, 72)):
        canvas.box(-0.22 + i * 0.13, 0.25, 0.12, height / 100 - 0.25, far)
    for i, height in enumerate((52, 70, 46, 60, 49, 76, 54, 45, 66)):
        left, top = -0.18 + i * 0.155, height / 100
        canvas.box(left, 0.25, 0.115, top - 0.25, near)
        for row in range(int(top * 18 - 7)):
            for column in range(3):
                if (i * 7 + row * 3 + column * 5) % 4:  # one window in four stays dark
                    canvas.box(left + 0.015 + column * 0.032, top - 0.05 - row * 0.052, 0.021, 0.030, window)
    _foreground(canvas, light, rgb("b9b4ad"), rgb("a39d97"))


def hills(canvas: Canvas, light: Light) -> None:
    mountains = path("-300,300 -50,660,50 220,500 480,740,50 800,480 1020,630,50 1300,300")
    canvas.polygon(mountains, light.on(rgb("7fa3b5"), 0.35))
    canvas.polygon(
        path("-300,300 -300,500 100,620,300 500,400,300 850,600,300 1300,400 1300,300"),
        light.on(rgb("79b45c"), 0.15),
    )
    canvas.polygon(path("-300,200 -300,420 200,400,300 620,520,300 1300,380 1300,200"), light.on(rgb("4f9748")))
    for x, y, size in (
        (-0.07, 0.50, 0.10),
        (0.05, 0.48, 0.13),
        (0.14, 0.47, 0.09),
        (0.90, 0.47, 0.13),
        (1.02, 0.46, 0.10),
    ):
        canvas.box(x - 0.008, y - 0.12, 0.016, 0.12, light.on(rgb("6b4a35")))
        for lift, wide in ((-0.5, 0.42), (-0.1, 0.33), (0.3, 0.23)):
            low = y + lift * size
            tree = ((x - wide * size, low), (x, low + 0.85 * size), (x + wide * size, low))
            canvas.polygon(tree, light.on(rgb("2f6e4a")))
    _foreground(canvas, light, rgb("5faa50"), rgb("8cc063"))


def desert(canvas: Canvas, light: Light) -> None:
    for left, right, top, haze in (
        (-0.12, 0.22, 0.60, 0.3),
        (0.62, 0.92, 0.66, 0.2),
        (0.36, 0.50, 0.54, 0.4),
    ):
        rim = ((left, top - 0.08), (left + 0.03, top), (right - 0.03, top), (right, top - 0.08))
        canvas.polygon(((left - 0.05, 0.3), *rim, (right + 0.06, 0.3)), light.on(rgb("c8693f"), haze))
        canvas.polygon((*rim, (right - 0.03, top - 0.12), (left + 0.03, top - 0.11)), light.on(rgb("d9814f"), haze))
    canvas.polygon(path("-300,200 -300,440 150,500,300 600,380,300 1300,520 1300,200"), light.on(rgb("e8b878"), 0.1))
    canvas.polygon(path("-300,200 -300,360 300,360,400 800,480,300 1300,360 1300,200"), light.on(rgb("dfa562")))
    green = light.on(rgb("4f7f4f"))
    for x, low, high in ((0.06, 0.40, 0.20), (0.93, 0.42, 0.16)):
        canvas.line(((x, low - 0.1), (x, low + high)), green, 0.036)
        canvas.disc(x, low + high, 0.018, green)
        for tip, elbow, end in ((x - 0.05, 0.35, 0.75), (x + 0.05, 0.5, 0.85)):
            canvas.line(((x, low + elbow * high), (tip, low + elbow * high), (tip, low + end * high)), green, 0.024)
            canvas.disc(tip, low + end * high, 0.012, green)
    _foreground(canvas, light, rgb("d9a05f"), rgb("e6b878"))


def sea(canvas: Canvas, light: Light) -> None:
    canvas.polygon(path("550,500 660,570,50 800,620,100 980,560,50 1120,500"), light.on(rgb("6d94a8"), 0.4))
    canvas.gradient(0.52, 0.32, light.on(rgb("49b3c9"), 0.25), light.on(rgb("2a8fb5")), light.on(rgb("1f7aa5")))
    for i in range(18):
        x, y = i * 0.381966 % 1.4 - 0.2, 0.50 - i % 6 * 0.03
        canvas.line(((x, y), (x + 0.07, y)), fade(mix(light.lamp, light.sky[-1], 0.3), 110), 0.007)
    for x, size in ((0.17, 0.20), (0.43, 0.10)):
        for sail, colour in (
            (((0.0, 0.15), (0.0, 1.15), (0.5, 0.15)), WHITE),
            (((-0.04, 0.15), (-0.04, 0.95), (-0.38, 0.15)), rgb("f2785c")),
            (((-0.45, 0.1), (0.55, 0.1), (0.4, -0.05), (-0.3, -0.05)), rgb("7a4632")),
        ):
            canvas.polygon(np.array(sail) * size + (x, 0.50), light.on(colour))
    _foreground(canvas, light, rgb("f3dfae"), rgb("e3c68c"))


SCENES = {scene.__name__: scene for scene in (city, hills, desert, sea)}
PAN = 0.12  # how far the eye wanders along a scene, to either side


@lru_cache(maxsize=len(SCENES) * len(LIGHTS))
def panorama(scene: str, light: str, size: int) -> Canvas:
    """A scene under a light, wider than a picture by ``PAN`` on either side; shared, so paint on a part."""
    canvas = Canvas(size, wide=1.0 + 2 * PAN)
    canvas.move(PAN)
    sky(canvas, LIGHTS[light])
    SCENES[scene](canvas, LIGHTS[light])
    return canvas


def _foreground(canvas: Canvas, light: Light, *verge: Colour) -> None:
    canvas.gradient(0.33, 0.25, *map(light.on, verge))
    canvas.gradient(0.26, 0.0, light.on(rgb("6b6d78")), light.on(rgb("4b4d59")))
    canvas.box(-0.3, 0.245, 1.6, 0.015, light.on(rgb("e9e4d8")))
    for i in range(6):
        canvas.box(-0.27 + i * 0.27, 0.03, 0.14, 0.025, light.on(rgb("f0e6c8")))
