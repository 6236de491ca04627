"""The steps from noise to image, side by side."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sturdy.diffusion.sampler import Step
from sturdy.evaluation.figures import image_table
from sturdy.evaluation.report import Report

MAX_COLUMNS = 10


def walk_section(
    report: Report, steps: Sequence[Step], decode: Callable[[Tensor], Tensor] = lambda x0: x0
) -> None:
    """Add a section on the ``steps`` of a sampler.

    Args:
        report: gets the section.
        steps: of one batch.
        decode: from x_0 ``(b, c, h, w)`` to images, as of the space.
    """
    chosen = select_steps(steps)
    states = torch.stack([decode(_visible(step.x)) for step in chosen], dim=1)
    estimates = torch.stack([decode(step.x0).float().cpu() for step in chosen], dim=1)
    rows = torch.stack([states.cpu(), estimates], dim=1).flatten(0, 1)  # (2 b, steps, c, h, w)
    names = ["state", "estimate"] * (len(rows) // 2)
    report.heading("From noise to image")
    report.figure(
        "walk.png",
        image_table(rows, columns=[f"t = {step.t:.2g}" for step in chosen], rows=names),
        f"Of {len(steps)} steps; of each sample the state, and below it the expected image",
    )


def select_steps(steps: Sequence[Step]) -> list[Step]:
    """Return at most ``MAX_COLUMNS`` of ``steps``, evenly, with the first and the last."""
    count = min(MAX_COLUMNS, len(steps))
    return [steps[round(i)] for i in torch.linspace(0, len(steps) - 1, count).tolist()]


def _visible(x: Tensor) -> Tensor:
    """Shrink states whose values are far above those of an image."""
    x = x.float()
    return x / max(1.0, 2 * x.std().item())
