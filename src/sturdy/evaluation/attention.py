"""Where a network looks, by noise level: what a token attends to in the first, the middle and the
last attention.

    a(i, j) = softmax over j of <q_i, k_j> / sqrt(head_dim),   distance = mean over i of sum over j
    of a(i, j) |i - j|

The mean attention distance (Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", figure 7) is
to attention what the size of the kernel is to a convolution.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from sturdy.encoders.pictures import ImageSet, scaled
from sturdy.evaluation.levels import Denoising
from sturdy.evaluation.report import Report
from sturdy.sampling.grids import grid

LEVELS = (0.1, 0.4, 1.0, 2.5, 10.0)  # noise to picture, which is in [-1, 1]
FROM = {
    "from the centre": (0.5, 0.5),
    "from the upper left": (0.2, 0.2),
}  # parts of the height and of the width
MEASURED, N_EXAMPLES = 8, 2  # pictures
HEAT = torch.tensor(
    [[38, 20, 96], [142, 40, 122], [226, 84, 74], [252, 168, 56], [255, 246, 166]]
).float()
TILE, LEFT, TOP, GAP, WIDE = 96, 76, 46, 3, 16  # pixels of the figure


@runtime_checkable
class Attends(Protocol):
    """An attention that can be looked into, whose tokens are the squares of the image, row by
    row.
    """

    def queries_keys_values(self, *args: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the arguments of ``forward``, ``(b, heads, tokens, head_dim)`` each."""


@dataclass(frozen=True)
class Look:
    """What one layer attended to in ``b`` pictures, on average over its heads.

    Attributes:
        maps: of the tokens at ``FROM``, ``(b, len(FROM), rows, columns)``; each sums to 1.
        distance: mean attention distance in pixels, ``(b,)``.
        uniform: that of attention to all tokens alike.
    """

    maps: Tensor
    distance: Tensor
    uniform: float


def weights(q: Tensor, k: Tensor) -> Tensor:
    """How much each query attends to each key, ``(..., n, d), (..., m, d) -> (..., n, m)``; rows
    sum to 1.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    return torch.softmax(
        q.to(dtype) @ k.to(dtype).transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1
    )


def look(q: Tensor, k: Tensor, height: int, width: int) -> Look | None:
    """Of queries and keys ``(b, heads, tokens, d)`` of images of this size; None if the tokens are
    not its squares.
    """
    tokens = q.shape[2]
    side = math.isqrt(height * width // tokens)  # of a token, in pixels
    if not side or side**2 * tokens != height * width or height % side:
        return None
    rows, columns = height // side, width // side
    places = (
        torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).to(q.device).float() * side
    )
    total = torch.zeros(len(q), device=q.device)
    for part, there in zip(
        q.split(64, dim=2), places.split(64), strict=True
    ):  # all queries at once may not fit
        total += (weights(part, k).mean(1) * torch.cdist(there, places)).sum((1, 2))
    asked = [
        row * columns + column
        for row, column in (token(point, rows, columns) for point in FROM.values())
    ]
    maps = weights(q[:, :, asked], k).mean(1).unflatten(2, (rows, columns))
    uniform = (
        torch.stack([torch.cdist(there, places).mean(1).sum() for there in places.split(64)]).sum()
        / tokens
    )
    return Look(maps.cpu(), (total / tokens).cpu(), uniform.item())


def token(point: tuple[float, float], rows: int, columns: int) -> tuple[int, int]:
    """Row and column of the one at ``point``."""
    return int(point[0] * rows), int(point[1] * columns)


@contextmanager
def watching(layers: Sequence[nn.Module], height: int, width: int) -> Iterator[list[Look]]:
    """While a network is called on images of this size: a ``Look`` for each call of each of
    ``layers``.
    """
    looks: list[Look] = []

    def watch(layer: Any, args: tuple[Tensor, ...]) -> None:
        q, k, _ = layer.queries_keys_values(*args)
        if found := look(q, k, height, width):
            looks.append(found)

    hooks = [layer.register_forward_pre_hook(watch) for layer in layers]
    try:
        yield looks
    finally:
        for hook in hooks:
            hook.remove()


def attention_section(report: Report, denoising: Denoising, held_out: ImageSet) -> None:
    """A section of maps and distances; none for a network without attention that can be looked
    into.
    """
    network, real = denoising.denoiser, held_out[:MEASURED]
    found = (
        [m for m in network.modules() if isinstance(m, Attends)]
        if isinstance(network, nn.Module)
        else []
    )
    chosen = sorted({0, (len(found) - 1) // 2, len(found) - 1}) if found else []
    seen, looks = [], []
    for ratio in LEVELS if found else ():
        with watching([found[i] for i in chosen], *real.pixels.shape[2:]) as new:
            noisy, estimates = denoising.pictures(real, ratio)
        seen.append((noisy / max(1, 2 * ratio), estimates))  # else it is black and white only
        looks.append(new)
    if not looks or any(len(new) != len(chosen) for new in looks):
        return
    names = [f"layer {i + 1} of {len(found)}" for i in chosen]
    uniform = [one.uniform for one in looks[0]]
    distances = [[one.distance.mean().item() for one in new] for new in looks]
    report.heading("Where it looks")
    report.text(
        f"Mean attention distance: how many pixels away is what a token attends to, on average "
        f"over tokens, heads and "
        f"{len(real)} held-out images. By noise (sigma / alpha), in the first, the middle and the "
        f"last attention."
    )
    rows = [
        [f"{ratio:g}", *(f"{d:.2f}" for d in line)]
        for ratio, line in zip(LEVELS, distances, strict=True)
    ]
    report.table(["noise", *names], [*rows, ["all tokens alike", *(f"{u:.2f}" for u in uniform)]])
    by_layer = {name: [line[i] for line in distances] for i, name in enumerate(names)}
    report.numbers["attention"] = {
        "noise": list(LEVELS),
        **by_layer,
        "uniform": dict(zip(names, uniform, strict=True)),
    }
    caption = (
        "Held-out images with more and more noise, what is made of them, and on the image without "
        "noise what the "
        "marked token attends to. A map is scaled to its maximum, which stands in its corner: 1 is "
        "to all alike"
    )
    report.picture(
        "attention.png", figure(scaled(real.pixels[:N_EXAMPLES]), seen, looks, names), caption
    )


def figure(
    images: Tensor,
    seen: Sequence[Sequence[Tensor]],
    looks: Sequence[Sequence[Look]],
    names: Sequence[str],
) -> Image.Image:
    """A block of rows for each of ``images`` ``(n, c, h, w)``, a row a level, a column a layer and
    token.

    Args:
        seen: for each level, with noise and without it again, ``(n or more, c, h, w)`` each.
        looks: for each level, that of each layer, whose names are ``names``.
    """
    width, height = tile(images[0]).size
    groups = {"": ["with noise", "estimate"], **{title: names for title in FROM}}
    across = sum(len(group) for group in groups.values()) * (width + GAP) + WIDE * len(FROM)
    down = len(images) * (len(looks) * (height + GAP) + WIDE)
    page = Image.new("RGB", (LEFT + across, TOP + down), "white")
    pen, font, x, starts = ImageDraw.Draw(page), ImageFont.load_default(12), LEFT, []
    for title, group in groups.items():
        pen.text((x, 6), title, fill="black", font=ImageFont.load_default(14))
        for name in group:
            pen.text((x + width / 2, TOP - 5), name, fill="#555b66", font=font, anchor="mb")
            starts.append(x)
            x += width + GAP
        x += WIDE
    y = TOP
    for i, image in enumerate(images):
        for ratio, pair, layers in zip(LEVELS, seen, looks, strict=True):
            pen.text(
                (LEFT - 8, y + height / 2), f"noise {ratio:g}", fill="black", font=font, anchor="rm"
            )
            row = [tile(part[i]) for part in pair]
            row += [
                heat(image, one.maps[i, k], point)
                for k, point in enumerate(FROM.values())
                for one in layers
            ]
            for x, drawn in zip(starts, row, strict=True):
                page.paste(drawn, (x, y))
            y += height + GAP
        y += WIDE
    return page


def tile(image: Tensor) -> Image.Image:
    """``(c, h, w)`` in [-1, 1], magnified by a whole factor."""
    return grid(image[None], tile=TILE, gap=0)


def heat(image: Tensor, weights: Tensor, point: tuple[float, float]) -> Image.Image:
    """``image`` ``(c, h, w)`` in grey, and on it ``weights`` ``(rows, columns)`` of the token at
    ``point``, marked.
    """
    rows, columns = weights.shape
    strength = (weights / weights.max()) ** 0.75
    at = strength * (len(HEAT) - 1)
    low = at.long().clamp(max=len(HEAT) - 2)
    colour = (
        torch.lerp(HEAT[low], HEAT[low + 1], (at - low)[..., None]).permute(2, 0, 1) / 127.5 - 1
    )
    colour, strength = (
        x.repeat_interleave(image.shape[1] // rows, -2).repeat_interleave(
            image.shape[2] // columns, -1
        )
        for x in (colour, strength)
    )
    grey = 0.6 * image.mean(0, keepdim=True).expand(3, -1, -1) - 0.3
    drawn = tile(torch.lerp(grey, colour, 0.9 * strength))
    pen, (row, column) = ImageDraw.Draw(drawn), token(point, rows, columns)
    height, width = drawn.height // rows, drawn.width // columns
    left, top = column * width, row * height
    pen.rectangle([left - 1, top - 1, left + width, top + height], outline="black")
    pen.rectangle([left, top, left + width - 1, top + height - 1], outline="white")
    peak, corner = (
        f"{weights.max().item() * rows * columns:.1f}",
        (drawn.width - 3, drawn.height - 3),
    )
    pen.text(
        corner,
        peak,
        fill="white",
        font=ImageFont.load_default(11),
        anchor="rb",
        stroke_width=2,
        stroke_fill="black",
    )
    return drawn
