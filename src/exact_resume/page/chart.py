"""Curves as plain SVG, thinned to what a screen shows; no extreme value is lost.

A drawing is 1000 wide and 1000 high, and the page stretches it. Labels are HTML, so that they stay
legible on a phone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

COLUMNS = 480  # most points of a curve
SIZE = 1000  # of a drawing
TICKS = 5  # most lines of a grid
LOG_FROM = 10.0  # a range with a larger ratio is drawn on a logarithmic scale
DECADES = 100.0  # largest ratio to the median that such a scale shows
SMOOTHED = 40  # a smooth line averages over this part of the points, or fewer:
ENOUGH = 200  # over so many values

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """A metric over steps, with at most ``COLUMNS`` points.

    Attributes:
        name: of the metric.
        x: the middle step of each point.
        mean: of the values of each point.
        low: the least of them.
        high: the largest of them.
        not_finite: steps whose value is not a finite number.
        size: number of values.
    """

    name: str
    x: Array
    mean: Array
    low: Array
    high: Array
    not_finite: Array
    size: int


def thin(name: str, steps: Array, values: Array, columns: int = COLUMNS) -> Curve:
    """Put the values of neighbouring steps together, until at most ``columns`` points are left."""
    finite = np.isfinite(values)
    not_finite = steps[~finite][:columns]
    steps = steps[finite]
    values = values[finite]
    if len(steps) <= columns:
        return Curve(name, steps, values, values, values, not_finite, len(steps))
    column = (steps - steps[0]) * columns // (steps[-1] - steps[0] + 1)
    first = np.flatnonzero(np.diff(column, prepend=-1))
    counts = np.diff(first, append=len(steps))
    return Curve(
        name,
        np.add.reduceat(steps, first) // counts,
        np.add.reduceat(values, first) / counts,
        np.minimum.reduceat(values, first),
        np.maximum.reduceat(values, first),
        not_finite,
        len(steps),
    )


@dataclass(frozen=True)
class Scale:
    """The range of values that a chart shows, linear or logarithmic."""

    low: float
    high: float
    is_log: bool

    def place(self, values: Array) -> NDArray[np.int64]:
        """Return how far below the top of the drawing ``values`` are; others are at its edge."""
        values = np.clip(values, self.low, self.high)
        low, high = self.low, self.high
        if self.is_log:
            values, low, high = np.log(values), math.log(low), math.log(high)
        return np.rint(SIZE * (high - values) / (high - low)).astype(np.int64)

    def ticks(self) -> list[float]:
        """Return the values at which a line of the grid lies."""
        if not self.is_log:
            return round_numbers(self.low, self.high, (1, 2, 2.5, 5, 10))
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for digits in ((1, 2, 5), (1, 3), (1,)):
            found = [digit * 10.0**power for power in powers for digit in digits]
            found = [value for value in found if self.low <= value <= self.high]
            if len(found) <= TICKS:
                return found
        return found[:: math.ceil(len(found) / TICKS)]


def fit_scale(curves: Sequence[Curve], *, whole: bool = False) -> Scale:
    """Return a scale for ``curves`` on which a few extreme values do not flatten the rest.

    Args:
        curves: at least one has a point.
        whole: show all values, on a linear scale.
    """
    low = min(curve.low.min() for curve in curves if len(curve.x))
    high = max(curve.high.max() for curve in curves if len(curve.x))
    means = np.concatenate([curve.mean for curve in curves])
    is_log = bool(not whole and low > 0 and high > LOG_FROM * low)
    if is_log:
        median = float(np.median(means))
        return Scale(max(low, median / DECADES), min(high, median * DECADES), is_log)
    if not whole:
        least, largest = np.quantile(means, [0.02, 0.98])
        margin = 3 * (largest - least) or math.inf
        low = max(low, least - margin)
        high = min(high, largest + margin)
    margin = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    floor = 0.0 if low >= 0 and (whole or low - margin < 0) else low - margin
    return Scale(float(floor), float(high + margin), is_log)


def draw_chart(
    title: str,
    curves: Sequence[Curve],
    last: int,
    marks: str,
    *,
    number: int,
    legend: str = "",
    whole: bool = False,
) -> str:
    """Return the HTML of a chart.

    Args:
        title: above it.
        curves: at least one has a point; the first also gets a smooth line.
        last: the step at its right edge.
        marks: HTML that lies over the drawing.
        number: of the chart in the page's data.
        legend: HTML that explains the marks.
        whole: as of ``fit_scale``; and nothing is smoothed.
    """
    scale = fit_scale(curves, whole=whole)
    lines = [f"M0 {y}H{SIZE}" for y in scale.place(np.array(scale.ticks())).tolist()]
    drawing = [f'<path class="grid" d="{"".join(lines)}"/>']
    for i, curve in enumerate(curves):
        drawing += _draw_curve(curve, i, last, scale, smooth=not whole and i == 0)
    labels = []
    for value in scale.ticks():
        top = 100 * int(scale.place(np.array([value]))[0]) / SIZE
        labels.append(f'<span class="y" style="top:{top:.1f}%">{value:.4g}</span>')
    steps = []
    for step in filter(float.is_integer, round_numbers(0, last)):
        steps.append(f'<span class="x" style="left:{100 * step / last:.2f}%">{short(step)}</span>')
    names = [f'<span class="key k{i}">{escape(c.name)}</span>' for i, c in enumerate(curves)]
    if curves[0].name == title:
        names = []
    return (
        f'<figure class="chart"><figcaption><b>{escape(title)}</b> {" ".join(names)}{legend}'
        f"<output></output></figcaption>"
        f'<div class="plot" data-chart="{number}" tabindex="0" role="img" '
        f'aria-label="{escape(f"{title}: {_describe(curves)}")}">'
        f'<svg viewBox="0 0 {SIZE} {SIZE}" preserveAspectRatio="none" aria-hidden="true">'
        f"{''.join(drawing)}</svg>{''.join(labels)}{''.join(steps)}{marks}"
        f'<i class="cross" hidden></i></div></figure>'
    )


def chart_data(curves: Sequence[Curve]) -> list[dict[str, Any]]:
    """Return the points of ``curves`` as primitives, with four digits."""
    found = []
    for curve in curves:
        data: dict[str, Any] = {"n": curve.name, "x": curve.x.astype(int).tolist()}
        data["y"] = _digits(curve.mean)
        if curve.low is not curve.mean:
            data |= {"lo": _digits(curve.low), "hi": _digits(curve.high)}
        found.append(data)
    return found


def round_numbers(low: float, high: float, factors: Sequence[float] = (1, 2, 5, 10)) -> list[float]:
    """Return up to ``TICKS`` + 1 multiples of a round number between ``low`` and ``high``.

    Args:
        low: at most ``high``.
        high: the largest that may be returned.
        factors: the first digits of a round number.
    """
    raw = (high - low) / TICKS
    unit = 10.0 ** math.floor(math.log10(raw))
    size = next(factor * unit for factor in factors if factor * unit >= raw * 0.999)
    first = math.ceil(low / size - 1e-9)
    last = math.floor(high / size + 1e-9)
    return [float(f"{i * size:.12g}") for i in range(first, last + 1)]


def short(number: float) -> str:
    """Return a number of steps in few characters."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= 10 * size:
            return f"{number / size:g}{unit}"
    return f"{number:,.0f}"


def _draw_curve(curve: Curve, number: int, last: int, scale: Scale, *, smooth: bool) -> list[str]:
    """Return the paths of a curve: the band of its values, its line, and what the scale cuts."""
    x = np.rint(SIZE * curve.x / last).astype(np.int64)
    kind = f'class="k{number}'
    found = []
    if curve.low is not curve.mean:
        edge = [*_points(x, scale.place(curve.high))]
        edge += reversed(_points(x, scale.place(curve.low)))
        found.append(f'<path {kind} band" d="M{"L".join(edge)}Z"/>')
    means = "L".join(_points(x, scale.place(curve.mean)))
    smoothed = _smooth(curve) if smooth else None
    if smoothed is not None:
        if curve.low is curve.mean:
            found.append(f'<path {kind} raw" d="M{means}"/>')
        means = "L".join(_points(x, scale.place(smoothed)))
    if means:
        found.append(f'<path {kind} line" d="M{means}"/>')
    if number and len(x) <= 100:
        dots = "".join(f"M{point}h0" for point in _points(x, scale.place(curve.mean)))
        found.append(f'<path {kind} dots" d="{dots}"/>')
    beyond = [*x[curve.high > scale.high].tolist()]
    beyond += np.rint(SIZE * curve.not_finite / last).astype(np.int64).tolist()
    if beyond:
        dots = "".join(f"M{place} 0h0" for place in beyond)
        found.append(f'<path class="beyond" d="{dots}"><title>above the scale</title></path>')
    return found


def _points(x: NDArray[np.int64], y: NDArray[np.int64]) -> list[str]:
    return [f"{a} {b}" for a, b in zip(x.tolist(), y.tolist(), strict=True)]


def _smooth(curve: Curve) -> Array | None:
    """Return a running mean; None if the points are too few, or means of many values already."""
    points = len(curve.x)
    half = min(points // SMOOTHED, ENOUGH * points // max(curve.size, 1)) // 2
    if half < 1:
        return None
    total = np.cumsum(np.concatenate([[0.0], curve.mean]))
    places = np.arange(points)
    begin = np.maximum(places - half, 0)
    end = np.minimum(places + half + 1, points)
    mean: Array = (total[end] - total[begin]) / (end - begin)
    return mean


def _describe(curves: Sequence[Curve]) -> str:
    """Describe ``curves`` for people who cannot see them."""
    parts = []
    for curve in curves:
        if len(curve.x):
            parts.append(
                f"{curve.name} is {curve.mean[-1]:.4g} at step {int(curve.x[-1]):,}, "
                f"between {curve.low.min():.4g} and {curve.high.max():.4g}"
            )
    return "; ".join(parts)


def _digits(values: Array) -> list[float]:
    return [float(f"{value:.4g}") for value in values.tolist()]
