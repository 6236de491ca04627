"""Body types, paints, windows and rims.

Outlines are closed paths in thousandths of the image's width, seen from the side, front to the
right.
"""

from dataclasses import dataclass
from math import cos, pi, sin

import numpy as np

from examples.cars.painting import WHITE, Canvas, mix, path, rgb
from examples.cars.scenery import Light

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
    """Return the closed paths that ``|`` separates; see ``painting.path``."""
    return tuple(map(path, text.split("|")))


@dataclass(frozen=True, eq=False)
class Body:
    """A body type seen from the side, front to the right.

    The road is at ``y`` = 0, and the image is 1 wide.

    Attributes:
        outline: of the body.
        windows: of the body.
        seams: door lines, each with a handle behind its upper end.
        wheels: their places along x.
        radius: of a wheel.
        belt: height of the shoulder line.
        front: head light.
        rear: tail light.
        behind: dark parts that show past the outline: rails, wing, spare wheel.
        trim: dark parts on the body: mirrors, air intake, destination sign.
        sill: height of the lower edge of the doors.
    """

    outline: np.ndarray
    windows: tuple[np.ndarray, ...]
    seams: tuple[np.ndarray, ...]
    wheels: tuple[float, ...]
    radius: float
    belt: float
    front: np.ndarray
    rear: np.ndarray
    behind: tuple[np.ndarray, ...] = ()
    trim: tuple[np.ndarray, ...] = ()
    sill: float = 0.09


BODIES = {
    "hatchback": Body(
        outline=path(
            "150,50,30 135,230,50 160,300 245,455,90 560,455,120 700,285,30 845,255,80 "
            "870,50,40"
        ),
        windows=paths(
            "205,290,20 265,420,40 390,420,10 390,290,10 | 420,290,10 420,420,10 550,420,40 "
            "650,290,20"
        ),
        seams=paths("405,420 405,90 | 635,280 620,90"),
        wheels=(0.285, 0.725), radius=0.098, belt=0.26,
        front=path(
            "790,250 800,185,20 900,165 900,250"
        ), rear=path("100,290 100,200 175,200,20 185,290"),
        trim=paths("625,285,10 620,315,10 655,315,10 660,285,10"),
    ),
    "sedan": Body(
        outline=path(
            "45,50,30 30,265,35 215,280,30 315,410,70 575,410,90 705,275,40 945,245,60 "
            "970,50,40"
        ),
        windows=paths(
            "250,285,20 330,380,30 430,380,10 430,285,10 | 460,285,10 460,380,10 565,380,40 "
            "655,285,20"
        ),
        seams=paths("445,380 445,85 | 655,275 645,85 | 290,275 315,180"),
        wheels=(0.215, 0.775), radius=0.092, belt=0.25,
        front=path(
            "870,250 880,185,20 1000,170 1000,250"
        ), rear=path("0,260 0,185 85,185,20 100,260"),
        trim=paths("630,280,10 625,310,10 660,310,10 665,280,10"),
    ),
    "coupe": Body(
        outline=path(
            "50,50,30 30,235,20 60,260,20 140,255,30 420,355,160 550,345,80 700,235,60 930,175,100 "
            "975,50,40"
        ),
        windows=paths("250,245,30 430,330,60 535,325,50 635,240,20"),
        seams=paths("400,220 420,80 | 645,230 635,80"),
        wheels=(0.215, 0.775), radius=0.097, belt=0.215,
        front=path(
            "850,200 860,155,20 950,125,10 960,180"
        ), rear=path("0,225 0,165 95,165,20 120,225"),
        behind=paths("25,300,10 20,325,10 160,315,10 160,295,10 | 70,240 60,310 90,310 100,240"),
        trim=paths(
            "600,235,10 590,260,10 630,260,10 635,235,10 | 335,190,10 350,145,10 385,145,10 "
            "375,190,10"
        ),
    ),
    "suv": Body(
        outline=path("100,75,30 90,300,30 115,500,60 610,500,70 710,325,30 910,305,50 925,75,30"),
        windows=paths(
            "135,335,10 150,460,30 250,460,10 250,335,10 | 285,335,10 285,460,10 430,460,10 "
            "430,335,10 | "
            "465,335,10 465,460,10 595,460,30 665,335,10"
        ),
        seams=paths("268,460 268,260 | 448,460 448,120 | 645,320 635,120"),
        wheels=(0.265, 0.745), radius=0.115, belt=0.305, sill=0.125,
        front=path(
            "860,285 860,215,20 1000,215 1000,285"
        ), rear=path("0,310 0,200 125,200 125,310"),
        behind=paths(
            "150,508,10 160,530,10 570,530,10 590,508,10 | 180,490 180,520 210,520 210,490 | "
            "520,490 520,520 550,520 550,490 | 35,170,30 35,360,30 100,360,20 100,170,20"
        ),
        trim=paths("645,325,10 640,370,10 680,370,10 680,325,10"),
    ),
    "pickup": Body(
        outline=path(
            "40,70,20 35,265,20 405,265 420,460,50 620,460,80 730,300,30 945,275,50 "
            "960,70,30"
        ),
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
            "50,350,10 50,530,20 185,530,20 185,350,10 | 210,350,10 210,530,20 345,530,20 "
            "345,350,10 | "
            "370,350,10 370,530,20 505,530,20 505,350,10 | 530,350,10 530,530,20 665,530,20 "
            "665,350,10 | "
            "710,120,10 710,530,20 805,530,20 805,120,10 | 850,330,10 850,530,20 1000,530 1000,330"
        ),
        seams=paths("758,520 758,90"),
        wheels=(0.2, 0.6), radius=0.09, belt=0.315,
        front=path(
            "920,200,20 920,140,20 1000,140 1000,200"
        ), rear=path("0,240 0,150 55,150 55,240"),
        trim=paths("860,555 860,600 1000,600 1000,555"),
    ),
    "limousine": Body(
        outline=path(
            "10,45,20 0,205,30 100,215,30 170,320,60 680,320,80 780,215,40 985,190,50 "
            "1000,45,30"
        ),
        windows=paths(
            "125,220,10 185,295,30 225,295,10 225,220,10 | 245,220,10 245,295,10 345,295,10 "
            "345,220,10 | "
            "365,220,10 365,295,10 465,295,10 465,220,10 | 485,220,10 485,295,10 585,295,10 "
            "585,220,10 | "
            "605,220,10 605,295,10 675,295,30 745,220,10"
        ),
        seams=paths("235,290 235,70 | 355,290 355,70 | 595,290 595,70 | 740,210 735,70"),
        wheels=(0.145, 0.83), radius=0.075, belt=0.19, sill=0.075,
        front=path("920,190 925,140,10 1000,130 1000,190"), rear=path("0,200 0,140 50,140 60,200"),
    ),
}  # fmt: skip


def disc(canvas: Canvas, x: float, radius: float, light: Light) -> None:
    """Paint the rim of a wheel at ``x``: a disc."""
    silver = light.near(SILVER)
    canvas.disc(x, radius, 0.66 * radius, mix(silver, BLACK, 0.25))
    canvas.disc(x, radius, 0.60 * radius, silver)
    canvas.disc(x, radius, 0.34 * radius, mix(silver, WHITE, 0.45))
    canvas.disc(x, radius, 0.12 * radius, mix(silver, BLACK, 0.4))


def spokes(canvas: Canvas, x: float, radius: float, light: Light) -> None:
    """Paint the rim of a wheel at ``x``: five spokes."""
    silver = light.near(SILVER)
    canvas.disc(x, radius, 0.70 * radius, mix(silver, BLACK, 0.35))
    canvas.disc(x, radius, 0.61 * radius, light.near(rgb("3a3d47")))
    for angle in (pi / 2 + 2 * pi * k / 5 for k in range(5)):
        tip = (x + 0.62 * radius * cos(angle), radius + 0.62 * radius * sin(angle))
        canvas.line(((x, radius), tip), silver, 0.17 * radius)
    canvas.disc(x, radius, 0.16 * radius, silver)


def whitewall(canvas: Canvas, x: float, radius: float, light: Light) -> None:
    """Paint the rim of a wheel at ``x``: a white wall around a dark disc."""
    canvas.disc(x, radius, 0.80 * radius, light.near(WHITE))
    canvas.disc(x, radius, 0.52 * radius, light.near(rgb("2c2f3a")))
    canvas.disc(x, radius, 0.22 * radius, light.near(rgb("e0b64a")))


RIMS = {rim.__name__: rim for rim in (disc, spokes, whitewall)}
