"""The embedded data set: cars drawn from their attributes, at any resolution.

    image(i) = draw(attributes(seed, i), size)

No file is read: every attribute is a hash of ``(seed, i, its name)``, and ``draw`` is exact arithmetic.
"""

from dataclasses import dataclass
from math import cos, pi, sin
from typing import Any

import numpy as np

from sturdy.data.painting import (
    LIGHTS,
    PAN,
    SCENES,
    WHITE,
    Canvas,
    Colour,
    Light,
    fade,
    mix,
    panorama,
    path,
    rgb,
)
from sturdy.randomness import key

DRAWING = 1  # raise it whenever a pixel changes, so that no cache of the old pixels is read
RARE, ODDS = "limousine", 50  # one car in fifty is of this body; the others are equally frequent

PAINTS = {
    "red": rgb("d63c35"),
    "orange": rgb("f08030"),
    "yellow": rgb("f6c834"),
    "green": rgb("3f9a5c"),
    "blue": rgb("2f6fd0"),
    "purple": rgb("8a55b5"),
    "white": rgb("f4f3ee"),
    "black": rgb("444956"),
}
WINDOWS = {"clear": rgb("b5e0ee"), "smoked": rgb("1d2430"), "bronze": rgb("b8763a")}
BLACK, RUBBER, SILVER = rgb("10121a"), rgb("23252d"), rgb("d5d9e0")


def paths(text: str) -> tuple[np.ndarray, ...]:
    return tuple(map(path, text.split("|")))


@dataclass(frozen=True, eq=False)
class Body:
    """A body type seen from the side, front to the right; the road is at ``y`` = 0, the picture 1 wide."""

    outline: np.ndarray
    windows: tuple[np.ndarray, ...]
    seams: tuple[np.ndarray, ...]  # door lines, each with a handle behind its upper end
    wheels: tuple[float, ...]  # where along x they stand
    radius: float  # of a wheel
    belt: float  # height of the shoulder line
    front: np.ndarray  # head light
    rear: np.ndarray  # tail light
    behind: tuple[np.ndarray, ...] = ()  # dark parts that show past the outline: rails, wing, spare wheel
    trim: tuple[np.ndarray, ...] = ()  # dark parts on the body: mirrors, air intake, destination sign
    sill: float = 0.09  # height of the lower edge of the doors


BODIES = {
    "hatchback": Body(
        outline=path("150,50,30 135,230,50 160,300 245,455,90 560,455,120 700,285,30 845,255,80 870,50,40"),
        windows=paths(
            "205,290,20 265,420,40 390,420,10 390,290,10 | 420,290,10 420,420,10 550,420,40 650,290,20"
        ),
        seams=paths("405,420 405,90 | 635,280 620,90"),
        wheels=(0.285, 0.725), radius=0.098, belt=0.26,
        front=path("790,250 800,185,20 900,165 900,250"), rear=path("100,290 100,200 175,200,20 185,290"),
        trim=paths("625,285,10 620,315,10 655,315,10 660,285,10"),
    ),
    "sedan": Body(
        outline=path("45,50,30 30,265,35 215,280,30 315,410,70 575,410,90 705,275,40 945,245,60 970,50,40"),
        windows=paths(
            "250,285,20 330,380,30 430,380,10 430,285,10 | 460,285,10 460,380,10 565,380,40 655,285,20"
        ),
        seams=paths("445,380 445,85 | 655,275 645,85 | 290,275 315,180"),
        wheels=(0.215, 0.775), radius=0.092, belt=0.25,
        front=path("870,250 880,185,20 1000,170 1000,250"), rear=path("0,260 0,185 85,185,20 100,260"),
        trim=paths("630,280,10 625,310,10 660,310,10 665,280,10"),
    ),
    "coupe": Body(
        outline=path(
            "50,50,30 30,235,20 60,260,20 140,255,30 420,355,160 550,345,80 700,235,60 930,175,100 975,50,40"
        ),
        windows=paths("250,245,30 430,330,60 535,325,50 635,240,20"),
        seams=paths("400,220 420,80 | 645,230 635,80"),
        wheels=(0.215, 0.775), radius=0.097, belt=0.215,
        front=path("850,200 860,155,20 950,125,10 960,180"), rear=path("0,225 0,165 95,165,20 120,225"),
        behind=paths("25,300,10 20,325,10 160,315,10 160,295,10 | 70,240 60,310 90,310 100,240"),
        trim=paths(
            "600,235,10 590,260,10 630,260,10 635,235,10 | 335,190,10 350,145,10 385,145,10 375,190,10"
        ),
    ),
    "suv": Body(
        outline=path("100,75,30 90,300,30 115,500,60 610,500,70 710,325,30 910,305,50 925,75,30"),
        windows=paths(
            "135,335,10 150,460,30 250,460,10 250,335,10 | 285,335,10 285,460,10 430,460,10 430,335,10 | "
            "465,335,10 465,460,10 595,460,30 665,335,10"
        ),
        seams=paths("268,460 268,260 | 448,460 448,120 | 645,320 635,120"),
        wheels=(0.265, 0.745), radius=0.115, belt=0.305, sill=0.125,
        front=path("860,285 860,215,20 1000,215 1000,285"), rear=path("0,310 0,200 125,200 125,310"),
        behind=paths(
            "150,508,10 160,530,10 570,530,10 590,508,10 | 180,490 180,520 210,520 210,490 | "
            "520,490 520,520 550,520 550,490 | 35,170,30 35,360,30 100,360,20 100,170,20"
        ),
        trim=paths("645,325,10 640,370,10 680,370,10 680,325,10"),
    ),
    "pickup": Body(
        outline=path("40,70,20 35,265,20 405,265 420,460,50 620,460,80 730,300,30 945,275,50 960,70,30"),
        windows=paths("445,305,10 450,425,20 605,425,40 685,305,20"),
        seams=paths("408,300 408,100 | 680,300 665,100"),
        wheels=(0.215, 0.785), radius=0.105, belt=0.265, sill=0.11,
        front=path("890,265 890,195,20 1000,195 1000,265"), rear=path("0,245 0,165 75,165 75,245"),
        behind=paths("20,270 20,290,10 410,290 410,270 | 375,250 375,430,10 410,430 410,250"),
        trim=paths("665,295,10 660,335,10 700,335,10 700,295,10"),
    ),
    "van": Body(
        outline=path("60,50,30 50,540,60 640,540,80 820,325,40 925,275,70 945,50,40"),
        windows=paths("545,325,10 545,480,20 645,480,30 765,325,20"),
        seams=paths("520,500 520,85 | 275,500 275,200 | 730,300 700,200 | 275,500 520,500"),
        wheels=(0.225, 0.765), radius=0.092, belt=0.29,
        front=path("870,265 850,200,20 1000,180 1000,265"), rear=path("0,330 0,200 80,200 80,330"),
        trim=paths("715,320,10 715,375,10 755,375,10 755,320,10"),
    ),
    "bus": Body(
        outline=path("30,50,30 20,615,50 955,615,60 980,300,50 975,50,30"),
        windows=paths(
            "50,350,10 50,530,20 185,530,20 185,350,10 | 210,350,10 210,530,20 345,530,20 345,350,10 | "
            "370,350,10 370,530,20 505,530,20 505,350,10 | 530,350,10 530,530,20 665,530,20 665,350,10 | "
            "710,120,10 710,530,20 805,530,20 805,120,10 | 850,330,10 850,530,20 1000,530 1000,330"
        ),
        seams=paths("758,520 758,90"),
        wheels=(0.2, 0.6), radius=0.09, belt=0.315,
        front=path("920,200,20 920,140,20 1000,140 1000,200"), rear=path("0,240 0,150 55,150 55,240"),
        trim=paths("860,555 860,600 1000,600 1000,555"),
    ),
    "limousine": Body(
        outline=path("10,45,20 0,205,30 100,215,30 170,320,60 680,320,80 780,215,40 985,190,50 1000,45,30"),
        windows=paths(
            "125,220,10 185,295,30 225,295,10 225,220,10 | 245,220,10 245,295,10 345,295,10 345,220,10 | "
            "365,220,10 365,295,10 465,295,10 465,220,10 | 485,220,10 485,295,10 585,295,10 585,220,10 | "
            "605,220,10 605,295,10 675,295,30 745,220,10"
        ),
        seams=paths("235,290 235,70 | 355,290 355,70 | 595,290 595,70 | 740,210 735,70"),
        wheels=(0.145, 0.83), radius=0.075, belt=0.19, sill=0.075,
        front=path("920,190 925,140,10 1000,130 1000,190"), rear=path("0,200 0,140 50,140 60,200"),
    ),
}  # fmt: skip


def disc(canvas: Canvas, x: float, radius: float, light: Light) -> None:
    silver = light.near(SILVER)
    canvas.disc(x, radius, 0.66 * radius, mix(silver, BLACK, 0.25))
    canvas.disc(x, radius, 0.60 * radius, silver)
    canvas.disc(x, radius, 0.34 * radius, mix(silver, WHITE, 0.45))
    canvas.disc(x, radius, 0.12 * radius, mix(silver, BLACK, 0.4))


def spokes(canvas: Canvas, x: float, radius: float, light: Light) -> None:
    silver = light.near(SILVER)
    canvas.disc(x, radius, 0.70 * radius, mix(silver, BLACK, 0.35))
    canvas.disc(x, radius, 0.61 * radius, light.near(rgb("3a3d47")))
    for angle in (pi / 2 + 2 * pi * k / 5 for k in range(5)):
        tip = (x + 0.62 * radius * cos(angle), radius + 0.62 * radius * sin(angle))
        canvas.line(((x, radius), tip), silver, 0.17 * radius)
    canvas.disc(x, radius, 0.16 * radius, silver)


def whitewall(canvas: Canvas, x: float, radius: float, light: Light) -> None:
    canvas.disc(x, radius, 0.80 * radius, light.near(WHITE))
    canvas.disc(x, radius, 0.52 * radius, light.near(rgb("2c2f3a")))
    canvas.disc(x, radius, 0.22 * radius, light.near(rgb("e0b64a")))


RIMS = {rim.__name__: rim for rim in (disc, spokes, whitewall)}

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
    """All there is to know about a picture: names out of ``OPTIONS``, and a little jitter in [-1, 1]."""

    body: str = "sedan"
    paint: str = "red"
    direction: str = "right"
    wheels: str = "disc"
    windows: str = "clear"
    backdrop: str = "hills"
    light: str = "day"
    shift: float = 0.0  # of the car, forwards, in fiftieths of the picture
    scale: float = 0.0  # of the car, in fiftieths
    pan: float = 0.0  # of the eye along the scene, in ``PAN``


class Cars:
    """A source of ``n`` labelled cars; car ``i`` is a function of ``(seed, i)`` alone.

    Args:
        n: number of images.
        size: height and width in pixels.
        seed: seed of the data set; a property of the data, not of the run.
    """

    classes = OPTIONS["body"]

    def __init__(self, *, n: int = 10_000, size: int = 32, seed: int = 0) -> None:
        self.n, self.size, self.seed = n, size, seed
        self.key = f"cars-drawing{DRAWING}-n{n}-size{size}-seed{seed}"

    def __len__(self) -> int:
        return self.n

    def attributes(self, index: int) -> Attributes:
        """What car ``index`` looks like, without drawing it.

        Raises:
            IndexError: if there is no such car.
        """
        index = self._checked(index)
        chance = {name: key("cars", self.seed, index, name) for name in (*OPTIONS, "rare", *JITTER)}
        bodies = (RARE,) if chance["rare"] % ODDS == 0 else tuple(body for body in BODIES if body != RARE)
        options = {**OPTIONS, "body": bodies}
        values: dict[str, Any] = {name: pick[chance[name] % len(pick)] for name, pick in options.items()}
        values |= {name: chance[name] / 2**62 - 1 for name in JITTER}
        return Attributes(**values)

    def label(self, index: int) -> int:
        """The class of car ``index``, counted in ``classes``."""
        return self.classes.index(self.attributes(index).body)

    def name(self, index: int) -> str:
        return f"car-{self._checked(index):08d}"

    def decode(self, index: int) -> np.ndarray:
        """The picture of car ``index``, uint8 ``(3, size, size)``."""
        return draw(self.attributes(index), self.size)

    def _checked(self, index: int) -> int:
        index = int(index)  # a NumPy integer would hash differently
        if not 0 <= index < self.n:
            raise IndexError(f"no car {index}: this data set of {self.n} has the cars 0 to {self.n - 1}")
        return index


def draw(attributes: Attributes, size: int) -> np.ndarray:
    """The picture with these attributes, uint8 ``(3, size, size)``."""
    canvas = panorama(attributes.backdrop, attributes.light, size).part(PAN + PAN * attributes.pan)
    scale = 0.95 + 0.02 * attributes.scale
    canvas.move(0.5 - 0.5 * scale + 0.02 * attributes.shift, 0.125, scale)
    if attributes.direction == "left":  # the scene stays as it is: turn it, paint the car, turn both back
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
            canvas.box(seam[0, 0] - 0.065, body.belt - 0.033, 0.035, 0.010, fade(mix(paint, BLACK, 0.6), 170))
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
            canvas.polygon(((x - 0.1, low), (x, top), (x + wide, top), (x + wide - 0.1, low)), reflection)


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
