"""The walk from noise to a picture as a film strip, which is what people look at to trust a
model.
"""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from sturdy.diffusion.sampler import Step
from sturdy.evaluation.report import Report
from sturdy.sampling.grids import grid


def walk(report: Report, steps: Sequence[Step]) -> None:
    """A section on the ``steps`` of a sampler."""
    report.heading("From noise to picture")
    caption = f"Of {len(steps)} steps; each sample twice: the state, and below it the picture expected from there"
    report.picture("walk.png", film(steps), caption)


def film(steps: Sequence[Step], *, columns: int = 10) -> Image.Image:
    """In time from left to right: for each sample a row of states, and one of estimates of the
    picture.
    """
    columns = min(columns, len(steps))
    chosen = [steps[round(i)] for i in torch.linspace(0, len(steps) - 1, columns).tolist()]
    states, estimates = (
        torch.stack([_seen(getattr(step, name)) for step in chosen], 1) for name in ("x", "x0")
    )
    rows = torch.stack([states, estimates], 1)  # (b, 2, columns, c, h, w)
    return grid(rows.flatten(0, 2), columns=columns)


def _seen(x: Tensor) -> Tensor:
    """On the CPU, and states of a scale far from a picture's shrunk to it."""
    x = x.float().cpu()
    return x / max(1.0, 2 * x.std().item())
