"""One row about a report, for the table of a sweep over evaluate.py."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from exact_resume.randomness import Draws
from sturdy.diffusion.denoiser import Denoiser
from sturdy.diffusion.sampler import Estimator, sample
from sturdy.evaluation.features import EfficientNet
from sturdy.evaluation.report import percent
from sturdy.sampling.config import SamplingConfig


class CallCounter:
    """A denoiser that counts the images that it is called with, and does not compute."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser
        self.calls = 0

    def __call__(self, x_t: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        """Count ``len(x_t)`` calls; return ``x_t``."""
        self.calls += len(x_t)
        return x_t

    def __getattr__(self, name: str) -> Any:
        """Return the attribute of the denoiser, such as its schedule."""
        return getattr(self.denoiser, name)


def count_network_calls(
    sampling: SamplingConfig, network: Denoiser, labels: Tensor | None, *, guided_by_network: bool
) -> int:
    """Return how many network calls one image takes; a guide counts, too."""
    counter = CallCounter(network)
    stand_in = cast(Denoiser, counter)
    denoiser: Estimator = sampling.add_guidance(
        stand_in, labels, stand_in if guided_by_network else None
    )
    label = None if labels is None else labels[:1].cpu()
    noise = torch.ones(1, 3, 2, 2)
    sample(sampling.make_sampler(), denoiser, noise, label, Draws(0, range(1)))
    return counter.calls


def summary_row(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of a sweep's table, against the held-out images, from a report."""
    found = numbers["quality"]["held_out_samples"]
    accuracy = numbers.get("class_accuracy")
    row = {"network calls": numbers["network_calls"], f"KID, {numbers['features']}": _kid(found)}
    second = numbers.get(f"quality_{EfficientNet.name}")
    if second:
        row[f"KID, {EfficientNet.name}"] = _kid(second["held_out_samples"])
    return {
        **row,
        "recall": percent(found["recall"]),
        "coverage": percent(found["coverage"]),
        "class accuracy": None if accuracy is None else percent(accuracy["all"]),
    }


def _kid(found: Mapping[str, float]) -> str:
    return f"{found['kid']:.4f} ± {found['kid_error']:.4f}"
