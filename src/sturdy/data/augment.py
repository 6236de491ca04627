"""Augmentation that does not leak: the network is told what was done, and at sampling that nothing
was.

(x_0, 0)  ->  (T_a x_0, a),    a drawn by position

Pixels are moved, never mixed, so that noise-free pictures stay noise-free. Source: Karras et al.
2022, "Elucidating the Design Space of Diffusion-Based Generative Models" (EDM), appendix F.2.
"""

import torch
from torch import Tensor

from exact_resume.randomness import Draws
from sturdy.data.options import check_choice, check_fraction

FIELDS = ("left to right", "down", "right", "one quarter", "two quarters", "three quarters")


class Augment:
    """``augment(image, draws) -> (image, condition)``: mirrored, shifted, and turned by quarters if
    ``rotate``.

    Args:
        probability: of each of them.
        translate: largest shift, as a share of the side; what comes in is the picture's own
            reflection.
        rotate: whether to turn, too.

    Attributes:
        size: length of a picture's condition.

    Raises:
        ValueError: an option is out of its range.
    """

    def __init__(
        self, probability: float, *, translate: float = 0.125, rotate: bool = False
    ) -> None:
        self.probability = check_fraction("data.augment", probability)
        self.translate = check_fraction("data.translate", translate)
        self.rotate = check_choice("data.rotate", rotate, (True, False))
        self.size = len(FIELDS) if rotate else 3

    def __call__(self, image: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """``(b, c, h, h) -> (b, c, h, h), (b, size)``: the condition is 0 where nothing was done.

        Its fields are ``FIELDS``: 0 or 1 for mirrors and turns, from -1 to 1 for shifts in units of
            the largest.
        """
        u, side = draws.uniform("augment", (6,)), image.shape[-1]
        mirrored, shifted, turned = (u[:, :3] < self.probability).unbind(1)
        most = int(self.translate * side)
        shifts = ((u[:, 3:5] * (2 * most + 1)).long() - most) * shifted[:, None]
        quarters = (1 + (u[:, 5] * 3).long()) * turned * self.rotate
        y, x = (reflected(torch.arange(side) - shift[:, None], side) for shift in shifts.T)
        y, x = torch.broadcast_tensors(
            y[:, :, None], x[:, None, :]
        )  # (b, h, h): where each pixel comes from
        for turn in range(3):
            further = (quarters > turn)[:, None, None]
            y, x = torch.where(further, x, y), torch.where(further, side - 1 - y, x)
        x = torch.where(mirrored[:, None, None], side - 1 - x, x)
        pixels = (y * side + x).flatten(1)[:, None].expand(-1, image.shape[1], -1)
        out = image.flatten(2).gather(2, pixels).view_as(image)
        turns = torch.nn.functional.one_hot(quarters, 4)[:, 1:]
        condition = torch.cat([mirrored[:, None], shifts / max(1, most), turns], dim=1).float()
        return out, condition[:, : self.size]


def reflected(i: Tensor, n: int) -> Tensor:
    """Indices in [0, n) of a row that goes on, beyond its ends, as in a mirror that shows these
    once.
    """
    period = max(1, 2 * n - 2)
    i = i.remainder(period)
    return torch.minimum(i, period - i)
