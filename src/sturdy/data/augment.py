"""Augmentation that does not leak into the samples: the network is told how an image was moved.

    (x_0, 0)  ->  (T_a x_0, a),    a drawn by position

At sampling the network is told a = 0. Pixels are moved, never mixed, so that noise-free images stay
noise-free. Source: Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative
Models" (EDM), appendix F.2.
"""

import torch
from torch import Tensor

from exact_resume.randomness import Draws
from sturdy.data.checks import check_choice, check_fraction

# the fields of the vector a
FIELDS = ("left to right", "down", "right", "one quarter", "two quarters", "three quarters")


class Augment:
    """Mirrors and shifts images, and turns them by quarters if ``rotate``.

    Args:
        probability: of each of them.
        translate: the largest shift, as a fraction of the side. Pixels from outside the image are
            its reflection.
        rotate: whether to turn, too; only squares can be turned.

    Attributes:
        size: length of the vector that describes the augmentation of an image.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self, probability: float, *, translate: float = 0.125, rotate: bool = False
    ) -> None:
        self.probability = check_fraction("augment", probability)
        self.translate = check_fraction("translate", translate)
        self.rotate = check_choice("rotate", rotate, (True, False))
        self.size = len(FIELDS) if rotate else 3

    def __call__(self, image: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Augment images and describe how, ``(b, c, h, w) -> (b, c, h, w), (b, size)``.

        The fields of a description are ``FIELDS``: 0 or 1 for mirrors and turns, and from -1 to 1
        for shifts, in units of the largest. All are 0 where the image was left as it is.
        """
        u = draws.uniform("augment", (6,))
        height, width = sides = image.shape[2:]
        mirrored, shifted, turned = (u[:, :3] < self.probability).unbind(1)
        largest = torch.tensor([int(self.translate * side) for side in sides])
        shifts = ((u[:, 3:5] * (2 * largest + 1)).long() - largest) * shifted[:, None]
        quarters = (1 + (u[:, 5] * 3).long()) * turned * self.rotate

        # (b, h, w): the row and the column that each pixel comes from
        rows, columns = (
            reflect(torch.arange(side) - shift[:, None], side)
            for shift, side in zip(shifts.T, sides, strict=True)
        )
        y, x = torch.broadcast_tensors(rows[:, :, None], columns[:, None, :])
        for turn in range(3):
            turn_again = (quarters > turn)[:, None, None]
            y, x = torch.where(turn_again, x, y), torch.where(turn_again, height - 1 - y, x)
        x = torch.where(mirrored[:, None, None], width - 1 - x, x)

        pixels = (y * width + x).flatten(1)[:, None].expand(-1, image.shape[1], -1)
        moved = image.flatten(2).gather(2, pixels).view_as(image)
        turns = torch.nn.functional.one_hot(quarters, 4)[:, 1:]
        fields = torch.cat([mirrored[:, None], shifts / largest.clamp(min=1), turns], dim=1).float()
        return moved, fields[:, : self.size]


def reflect(i: Tensor, n: int) -> Tensor:
    """Return indices in [0, n) of a row that is mirrored at its ends, which are not repeated."""
    period = max(1, 2 * n - 2)
    i = i.remainder(period)
    return torch.minimum(i, period - i)
