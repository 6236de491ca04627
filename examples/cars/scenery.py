"""The backgrounds: four scenes under three lights.

panorama(scene, light) = sky(light), then the scene, then the road
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from examples.cars.painting import WHITE, Canvas, Colour, fade, mix, path, rgb


@dataclass(frozen=True)
class Light:
    """The effect of the time of day on the sky and on colours."""

    sky: tuple[Colour, ...]  # from the zenith to the horizon
    tint: Colour  # a white wall under this light
    lamp: Colour  # sun or moon
    at: tuple[float, float]  # where that stands
    radius: float  # of its disc
    lit: int = 0  # how bright lamps are, 0 to 255
    clouds: bool = False
    stars: bool = False

    def on(self, colour: Colour, haze: float = 0.0) -> Colour:
        """Return a distant ``colour``; ``haze`` is 0 close by and 1 at the horizon."""
        return mix(
            tuple(c * t // 255 for c, t in zip(colour, self.tint, strict=True)), self.sky[-1], haze
        )

    def near(self, colour: Colour) -> Colour:
        """Return ``colour`` on the road, where street lamps take away two thirds of the night."""
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


def sky(canvas: Canvas, light: Light) -> None:
    """Paint the sky with sun or moon, stars and clouds."""
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
    for across, up, size in (
        (0.20, 0.88, 0.075),
        (0.52, 0.76, 0.05),
        (1.08, 0.92, 0.06),
    ) * light.clouds:
        for dx, wide in ((-1.1, 0.6), (0.0, 1.0), (1.15, 0.7)):
            canvas.disc(
                across + dx * size, up + 0.35 * wide * size, wide * size, fade(WHITE, 215), 0.62
            )


def city(canvas: Canvas, light: Light) -> None:
    """Paint two rows of houses."""
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
                    canvas.box(
                        left + 0.015 + column * 0.032,
                        top - 0.05 - row * 0.052,
                        0.021,
                        0.030,
                        window,
                    )
    _foreground(canvas, light, rgb("b9b4ad"), rgb("a39d97"))


def hills(canvas: Canvas, light: Light) -> None:
    """Paint mountains, hills and trees."""
    mountains = path("-300,300 -50,660,50 220,500 480,740,50 800,480 1020,630,50 1300,300")
    canvas.polygon(mountains, light.on(rgb("7fa3b5"), 0.35))
    canvas.polygon(
        path("-300,300 -300,500 100,620,300 500,400,300 850,600,300 1300,400 1300,300"),
        light.on(rgb("79b45c"), 0.15),
    )
    canvas.polygon(
        path("-300,200 -300,420 200,400,300 620,520,300 1300,380 1300,200"), light.on(rgb("4f9748"))
    )
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
    """Paint mesas, dunes and cacti."""
    for left, right, top, haze in (
        (-0.12, 0.22, 0.60, 0.3),
        (0.62, 0.92, 0.66, 0.2),
        (0.36, 0.50, 0.54, 0.4),
    ):
        rim = ((left, top - 0.08), (left + 0.03, top), (right - 0.03, top), (right, top - 0.08))
        canvas.polygon(
            ((left - 0.05, 0.3), *rim, (right + 0.06, 0.3)), light.on(rgb("c8693f"), haze)
        )
        canvas.polygon(
            (*rim, (right - 0.03, top - 0.12), (left + 0.03, top - 0.11)),
            light.on(rgb("d9814f"), haze),
        )
    canvas.polygon(
        path("-300,200 -300,440 150,500,300 600,380,300 1300,520 1300,200"),
        light.on(rgb("e8b878"), 0.1),
    )
    canvas.polygon(
        path("-300,200 -300,360 300,360,400 800,480,300 1300,360 1300,200"), light.on(rgb("dfa562"))
    )
    green = light.on(rgb("4f7f4f"))
    for x, low, high in ((0.06, 0.40, 0.20), (0.93, 0.42, 0.16)):
        canvas.line(((x, low - 0.1), (x, low + high)), green, 0.036)
        canvas.disc(x, low + high, 0.018, green)
        for tip, elbow, end in ((x - 0.05, 0.35, 0.75), (x + 0.05, 0.5, 0.85)):
            canvas.line(
                ((x, low + elbow * high), (tip, low + elbow * high), (tip, low + end * high)),
                green,
                0.024,
            )
            canvas.disc(tip, low + end * high, 0.012, green)
    _foreground(canvas, light, rgb("d9a05f"), rgb("e6b878"))


def sea(canvas: Canvas, light: Light) -> None:
    """Paint an island, waves and two sails."""
    canvas.polygon(
        path("550,500 660,570,50 800,620,100 980,560,50 1120,500"), light.on(rgb("6d94a8"), 0.4)
    )
    canvas.gradient(
        0.52, 0.32, light.on(rgb("49b3c9"), 0.25), light.on(rgb("2a8fb5")), light.on(rgb("1f7aa5"))
    )
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
PAN = 0.12  # largest shift of the view along a scene, to either side


@lru_cache(maxsize=len(SCENES) * len(LIGHTS))
def panorama(scene: str, light: str, size: int) -> Canvas:
    """Return a scene under a light, wider than an image by ``PAN`` on either side.

    The canvas is shared: paint on a ``part`` of it.
    """
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
