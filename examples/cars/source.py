"""A source of images: cars drawn from their attributes, at any resolution.

    image(i) = draw(attributes(seed, i), size)

No file is read: every attribute is a hash of ``(seed, i, its name)``, and ``draw`` is exact
arithmetic.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from exact_resume.randomness import key
from examples.cars.bodies import BLACK, BODIES, PAINTS, RIMS, RUBBER, WINDOWS, Body
from examples.cars.painting import WHITE, Canvas, Colour, fade, mix, rgb
from examples.cars.scenery import LIGHTS, PAN, SCENES, panorama
from sturdy.data.checks import check_int

DRAWING = 1  # raise it whenever a pixel changes, so that no cache of the old pixels is read
RARE, ODDS = "limousine", 50  # one car in fifty is of this body; the others are equally frequent

OPTIONS: dict[str, tuple[str, ...]] = {
    "body": tuple(BODIES),
    "paint": tuple(PAINTS),
    "direction": ("right", "left"),
    "wheels": tuple(RIMS),
    "windows": tuple(WINDOWS),
    "backdrop": tuple(SCENES),
    "light": tuple(LIGHTS),
}
JITTER = ("shift", "scale", "pan")


@dataclass(frozen=True)
class Attributes:
    """All attributes of an image: names out of ``OPTIONS``, and a little jitter in [-1, 1]."""

    body: str = "sedan"
    paint: str = "red"
    direction: str = "right"
    wheels: str = "disc"
    windows: str = "clear"
    backdrop: str = "hills"
    light: str = "day"
    shift: float = 0.0  # of the car, forwards, in fiftieths of the image
    scale: float = 0.0  # of the car, in fiftieths
    pan: float = 0.0  # of the view along the scene, in ``PAN``


class Cars:
    """A source of ``n`` labelled cars; car ``i`` is a function of ``(seed, i)`` alone.

    Args:
        n: number of images.
        size: height and width in pixels.
        seed: seed of the data set; a property of the data, not of the run.

    Raises:
        ValueError: if ``n`` or ``size`` is not a whole number of at least 1.
    """

    classes = OPTIONS["body"]

    def __init__(self, *, n: int = 10_000, size: int = 32, seed: int = 0) -> None:
        self.n = check_int("n", n)
        self.size = check_int("size", size)
        self.seed = seed
        self.key = f"cars-drawing{DRAWING}-n{n}-size{size}-seed{seed}"

    def __len__(self) -> int:
        return self.n

    def attributes(self, index: int) -> Attributes:
        """Return the attributes of car ``index``, without drawing it.

        Raises:
            IndexError: if there is no such car.
        """
        index = self._checked(index)
        chance = {name: key("cars", self.seed, index, name) for name in (*OPTIONS, "rare", *JITTER)}
        if chance["rare"] % ODDS == 0:
            bodies: tuple[str, ...] = (RARE,)
        else:
            bodies = tuple(body for body in BODIES if body != RARE)
        options = {**OPTIONS, "body": bodies}
        values: dict[str, Any] = {
            name: pick[chance[name] % len(pick)] for name, pick in options.items()
        }
        values |= {name: chance[name] / 2**62 - 1 for name in JITTER}
        return Attributes(**values)

    def label(self, index: int) -> int:
        """Return the class of car ``index``, as an index into ``classes``."""
        return self.classes.index(self.attributes(index).body)

    def name(self, index: int) -> str:
        """Return the name of car ``index`` for people."""
        return f"car-{self._checked(index):08d}"

    def decode(self, index: int) -> np.ndarray:
        """Return the image of car ``index``, uint8 ``(3, size, size)``."""
        return draw(self.attributes(index), self.size)

    def content(self, index: int) -> bytes:
        """Return the content that identifies car ``index`` at any size."""
        return repr(self.attributes(index)).encode()

    def _checked(self, index: int) -> int:
        index = int(index)  # a NumPy integer would hash differently
        if not 0 <= index < self.n:
            raise IndexError(
                f"no car {index}: this data set of {self.n} has the cars 0 to {self.n - 1}"
            )
        return index


def draw(attributes: Attributes, size: int) -> np.ndarray:
    """Draw the image with these attributes, uint8 ``(3, size, size)``."""
    canvas = panorama(attributes.backdrop, attributes.light, size).part(PAN + PAN * attributes.pan)
    scale = 0.95 + 0.02 * attributes.scale
    canvas.move(0.5 - 0.5 * scale + 0.02 * attributes.shift, 0.125, scale)
    if attributes.direction == "left":  # mirror the scene, paint the car, mirror both
        canvas.mirror()
    _car(canvas, attributes)
    if attributes.direction == "left":
        canvas.mirror()
    return canvas.pixels()


def _car(canvas: Canvas, attributes: Attributes) -> None:
    body, light = BODIES[attributes.body], LIGHTS[attributes.light]
    paint, dark, white = light.near(PAINTS[attributes.paint]), light.near(RUBBER), light.near(WHITE)
    (back, low), (nose, top) = body.outline.min(0), body.outline.max(0)
    canvas.glow((back + nose) / 2, 0.012, 0.52 * (nose - back), fade(BLACK, 46), flat=0.085)
    for part in body.behind:
        canvas.polygon(part, dark)
    canvas.line(((body.wheels[0], 0.06), (body.wheels[-1], 0.06)), BLACK, 0.05)
    with canvas.inside(body.outline):
        canvas.gradient(top, body.belt, mix(paint, white, 0.35), paint)
        canvas.gradient(body.belt, low, mix(paint, white, 0.14), paint, mix(paint, BLACK, 0.38))
        canvas.line(((0.0, body.belt), (1.0, body.belt)), fade(white, 120), 0.010)
        canvas.box(0.0, 0.0, 1.0, body.sill, mix(mix(paint, BLACK, 0.45), dark, 0.6))
        for seam in body.seams:
            canvas.line(seam, fade(mix(paint, BLACK, 0.65), 190), 0.006)
            canvas.box(
                seam[0, 0] - 0.065,
                body.belt - 0.033,
                0.035,
                0.010,
                fade(mix(paint, BLACK, 0.6), 170),
            )
        for x in body.wheels:
            canvas.disc(x, body.radius, 1.16 * body.radius, mix(paint, BLACK, 0.75))
        canvas.polygon(body.front, mix(light.near(rgb("f6f1dc")), rgb("fff3c0"), light.lit / 255))
        canvas.polygon(body.rear, mix(light.near(rgb("c8202c")), rgb("ff3b3b"), light.lit / 255))
        _glass(canvas, body, light.near(WINDOWS[attributes.windows]), fade(white, 80))
        for window in body.windows:
            canvas.line(window, mix(paint, BLACK, 0.6), 0.006, closed=True)
        for part in body.trim:
            canvas.polygon(part, dark)
    for x in body.wheels:
        canvas.disc(x, body.radius, body.radius, mix(dark, BLACK, 0.3))
        RIMS[attributes.wheels](canvas, x, body.radius, light)
    if light.lit:
        _lamps(canvas, nose, body.front[:, 1].mean(), back, body.rear[:, 1].mean(), light.lit)


def _glass(canvas: Canvas, body: Body, tint: Colour, reflection: Colour) -> None:
    top, low = max(w[:, 1].max() for w in body.windows), min(w[:, 1].min() for w in body.windows)
    with canvas.inside(*body.windows):
        canvas.gradient(top, low, mix(tint, fade(reflection, 255), 0.22), mix(tint, BLACK, 0.12))
        for x, wide in ((0.30, 0.030), (0.36, 0.012), (0.60, 0.030), (0.86, 0.030)):
            canvas.polygon(
                ((x - 0.1, low), (x, top), (x + wide, top), (x + wide - 0.1, low)), reflection
            )


def _lamps(canvas: Canvas, nose: float, head: float, back: float, tail: float, lit: int) -> None:
    warm, x = rgb("ffe9a0"), nose - 0.02
    for wide in (0.5, 0.75, 1.0):
        beam = (
            (x, head + 0.02),
            (x + 0.4, head + 0.09 * wide),
            (x + 0.4, head - 0.32 * wide),
            (x, head - 0.02),
        )
        canvas.polygon(beam, fade(warm, lit // 7))
    canvas.glow(x, head, 0.075, fade(warm, lit // 6))
    canvas.glow(back + 0.02, tail, 0.06, fade(rgb("ff4a3a"), lit // 8))
