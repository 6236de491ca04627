"""Attention maps by noise level: what a token attends to in the first, middle and last attention.

    a(i, j) = softmax over j of <q_i, k_j> / sqrt(head_dim)
    distance = mean over i of sum over j of a(i, j) |i - j|

The mean attention distance (Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", figure 7) is
to attention as the size of the kernel is to a convolution.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from sturdy.encoders.images import ImageSet, as_rgb, scaled
from sturdy.evaluation.figures import image_table
from sturdy.evaluation.levels import Denoising
from sturdy.evaluation.report import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEVELS = (0.1, 0.4, 1.0, 2.5, 10.0)  # noise sigma / alpha, for images in [-1, 1]
# Tokens whose attention is shown, as fractions of the height and of the width.
QUERY_POINTS = {"centre": (0.5, 0.5), "upper left": (0.2, 0.2)}
N_MEASURED = 8  # images
N_EXAMPLES = 2
QUERIES_AT_ONCE = 64  # bounds the memory


@runtime_checkable
class Attends(Protocol):
    """An attention layer whose tokens are the squares of the image, row by row."""

    def queries_keys_values(self, *args: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``(b, heads, tokens, head_dim)`` each, for the arguments of ``forward``."""


@dataclass(frozen=True)
class AttentionMaps:
    """The attention of one layer for ``b`` images, on average over its heads.

    Attributes:
        maps: of the tokens at ``QUERY_POINTS``, ``(b, points, rows, columns)``; each sums to 1.
        distance: mean attention distance in pixels, ``(b,)``.
        uniform: the distance of attention to all tokens alike.
    """

    maps: Tensor
    distance: Tensor
    uniform: float


def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    """Return how much each query attends to each key.

    Args:
        q: queries ``(..., n, d)``.
        k: keys ``(..., m, d)``.

    Returns:
        ``(..., n, m)``, at least float32; rows sum to 1.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(dtype) @ k.to(dtype).transpose(-1, -2)
    return torch.softmax(scores / math.sqrt(q.shape[-1]), dim=-1)


def attention_maps(q: Tensor, k: Tensor, height: int, width: int) -> AttentionMaps | None:
    """Return the maps and distances of one layer; None if its tokens are not the image's squares.

    Args:
        q: queries ``(b, heads, tokens, d)``.
        k: keys ``(b, heads, tokens, d)``.
        height: of the image, in pixels.
        width: of the image, in pixels.
    """
    tokens = q.shape[2]
    side = math.isqrt(height * width // tokens)  # of a token, in pixels
    if not side or side**2 * tokens != height * width or height % side:
        return None
    rows = height // side
    columns = width // side
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    places = grid.to(q.device).float() * side
    total = torch.zeros(len(q), device=q.device)
    total_uniform = 0.0
    for some, there in zip(
        q.split(QUERIES_AT_ONCE, dim=2), places.split(QUERIES_AT_ONCE), strict=True
    ):
        distances = torch.cdist(there, places)
        total += (attention_weights(some, k).mean(1) * distances).sum((1, 2))
        total_uniform += distances.mean(1).sum().item()
    chosen = []
    for point in QUERY_POINTS.values():
        row, column = token_at(point, rows, columns)
        chosen.append(row * columns + column)
    maps = attention_weights(q[:, :, chosen], k).mean(1).unflatten(2, (rows, columns))
    return AttentionMaps(maps.cpu(), (total / tokens).cpu(), total_uniform / tokens)


def token_at(point: tuple[float, float], rows: int, columns: int) -> tuple[int, int]:
    """Return row and column of the token at ``point``, fractions of the height and the width."""
    return int(point[0] * rows), int(point[1] * columns)


@contextmanager
def record_attention(
    layers: Sequence[nn.Module], height: int, width: int
) -> Iterator[list[AttentionMaps]]:
    """Record the maps of each call of ``layers`` while a network is called on images of a size."""
    recorded: list[AttentionMaps] = []

    def record(layer: Any, args: tuple[Tensor, ...]) -> None:
        q, k, _ = layer.queries_keys_values(*args)
        maps = attention_maps(q, k, height, width)
        if maps is not None:
            recorded.append(maps)

    hooks = [layer.register_forward_pre_hook(record) for layer in layers]
    try:
        yield recorded
    finally:
        for hook in hooks:
            hook.remove()


def attention_section(report: Report, denoising: Denoising, held_out: ImageSet) -> None:
    """Add a section of maps and distances; none for a network without such attention."""
    layers = _attention_layers(denoising.denoiser)
    if not layers:
        return
    real = held_out[:N_MEASURED]
    images, recorded = [], []
    for level in LEVELS:
        with record_attention(list(layers.values()), *real.pixels.shape[2:]) as maps:
            noisy, estimates = denoising.images(real, level)
        images.append((noisy / max(1, 2 * level), estimates))  # else noise is black and white only
        recorded.append(maps)
    if any(len(maps) != len(layers) for maps in recorded):
        return
    names = list(layers)
    uniform = [one.uniform for one in recorded[0]]
    distances = [[one.distance.mean().item() for one in maps] for maps in recorded]
    report.heading("Attention")
    report.text(
        f"Mean attention distance: how many pixels away a token attends to, on average over "
        f"tokens, heads and {len(real)} held-out images. By noise (sigma / alpha), in the first, "
        f"the middle and the last attention."
    )
    rows = []
    for level, line in zip(LEVELS, distances, strict=True):
        rows.append([f"{level:g}", *(f"{distance:.2f}" for distance in line)])
    rows.append(["all tokens alike", *(f"{distance:.2f}" for distance in uniform)])
    report.table(["noise", *names], rows)
    report.numbers["attention"] = {
        "noise": list(LEVELS),
        **{name: [line[i] for line in distances] for i, name in enumerate(names)},
        "uniform": dict(zip(names, uniform, strict=True)),
    }
    report.figure(
        "attention.png",
        _figure(scaled(real.pixels[:N_EXAMPLES]), images, recorded, names),
        "Held-out images with more and more noise, the estimates, and on the image without noise "
        "where the marked token attends to. A map is scaled to its maximum. The number in its "
        "corner is that maximum; 1 is attention to all tokens alike",
    )


def _attention_layers(network: object) -> dict[str, nn.Module]:
    """Return the first, the middle and the last attention of ``network``, by name."""
    if not isinstance(network, nn.Module):
        return {}
    found = [module for module in network.modules() if isinstance(module, Attends)]
    if not found:
        return {}
    last = len(found) - 1
    chosen = sorted({0, last // 2, last})
    return {f"layer {i + 1} of {len(found)}": found[i] for i in chosen}


def _figure(
    examples: Tensor,
    images: Sequence[tuple[Tensor, Tensor]],
    recorded: Sequence[Sequence[AttentionMaps]],
    names: Sequence[str],
) -> "Figure":
    """Draw a row for each example and level, and a column for each query point and layer.

    Args:
        examples: images without noise ``(n, c, h, w)``.
        images: with noise, and the estimates, by level.
        recorded: by level and layer.
        names: of the layers.
    """
    columns = ["with noise", "estimate"]
    columns += [f"{name}\n{point}" for point in QUERY_POINTS for name in names]
    row_names: list[str] = []
    rows: list[Tensor] = []
    marks = []
    for i, image in enumerate(examples):
        for level, pair, layers in zip(LEVELS, images, recorded, strict=True):
            row = [as_rgb(part[i]) for part in pair]
            for k, point in enumerate(QUERY_POINTS.values()):
                for layer in layers:
                    marks.append((len(rows), len(row), layer.maps[i, k], point))
                    row.append(overlay(image, layer.maps[i, k]))
            row_names.append(f"noise {level:g}")
            rows.append(torch.stack(row))
    figure = image_table(torch.stack(rows), columns=columns, rows=row_names)
    for row_number, column, weights, point in marks:
        _mark(figure, row_number, column, weights, point)
    return figure


def overlay(image: Tensor, weights: Tensor) -> Tensor:
    """Return ``image`` in grey, with ``weights`` ``(rows, columns)`` in colour, ``(3, h, w)``."""
    from matplotlib import colormaps

    strength = (weights / weights.max()) ** 0.75
    colour = torch.from_numpy(colormaps["inferno"](strength.numpy())[..., :3]).float()
    colour = colour.permute(2, 0, 1) * 2 - 1
    size = image.shape[1:]
    colour = nn.functional.interpolate(colour[None], size=size)[0]
    strength = nn.functional.interpolate(strength[None, None], size=size)[0]
    grey = 0.6 * image.mean(0, keepdim=True).expand(3, -1, -1) - 0.3
    return torch.lerp(grey, colour, 0.9 * strength)


def _mark(
    figure: "Figure", row: int, column: int, weights: Tensor, point: tuple[float, float]
) -> None:
    """Mark the query token in one cell of the table, and write the maximum into its corner."""
    from matplotlib.patches import Rectangle

    rows, columns = weights.shape
    token_row, token_column = token_at(point, rows, columns)
    corner = (column + token_column / columns, row + token_row / rows)
    axes = figure.axes[0]
    for colour, width in (("black", 1.8), ("white", 0.8)):
        axes.add_patch(
            Rectangle(corner, 1 / columns, 1 / rows, fill=False, edgecolor=colour, linewidth=width)
        )
    peak = weights.max().item() * rows * columns
    box = {"facecolor": "black", "alpha": 0.6, "linewidth": 0, "pad": 1}
    axes.text(
        column + 0.94, row + 0.92, f"{peak:.1f}", color="white", fontsize=6, ha="right", bbox=box
    )
