"""Figures of a report, drawn by matplotlib without a display."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from sturdy.encoders.images import as_rgb
from sturdy.sampling.grids import to_uint8

if TYPE_CHECKING:  # takes a second to import, so the functions do it
    from matplotlib.figure import Figure

CELL = 0.75  # inches


def log_chart(
    x: Sequence[float], lines: Mapping[str, Sequence[float]], *, xlabel: str, ylabel: str
) -> "Figure":
    """Draw ``lines`` over ``x`` on logarithmic axes, without values that are not above 0."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4), layout="constrained")
    axes = figure.subplots()
    for name, values in lines.items():
        axes.loglog(x, values, marker="o", markersize=4, label=name)
    axes.set_xticks(x, [f"{value:g}" for value in x])
    axes.minorticks_off()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(axis="y", alpha=0.4)
    axes.legend(frameon=False)
    return figure


def image_table(cells: Tensor, *, columns: Sequence[str], rows: Sequence[str]) -> "Figure":
    """Draw images as a table with named rows and columns.

    In the coordinates of its axes, the image in row ``i`` and column ``j`` is the square from
    ``(j, i)`` to ``(j + 1, i + 1)``.

    Args:
        cells: ``(rows, columns, c, h, w)`` in [-1, 1], grey or RGB.
        columns: names, above the images.
        rows: names, to the left of the images.
    """
    from matplotlib.figure import Figure

    cells = as_rgb(cells)
    n, m, channels, h, w = cells.shape
    pixels = to_uint8(cells.flatten(0, 1)).unflatten(0, (n, m))  # (rows, columns, h, w, c)
    sheet = pixels.transpose(1, 2).reshape(n * h, m * w, channels)
    height = CELL * h / w
    figure = Figure(figsize=(CELL * m + 1.2, height * n + 0.6), layout="constrained")
    axes = figure.subplots()
    axes.imshow(sheet.numpy(), extent=(0, m, n, 0), aspect=h / w, interpolation="nearest")
    axes.xaxis.tick_top()
    axes.set_xticks([j + 0.5 for j in range(m)], columns, fontsize=7)
    axes.set_yticks([i + 0.5 for i in range(n)], rows, fontsize=8)
    axes.set_xticks(range(m + 1), minor=True)
    axes.set_yticks(range(n + 1), minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    return figure
