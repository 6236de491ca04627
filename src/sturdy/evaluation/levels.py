"""The denoising error by noise level, of training images, held-out images, and other noise.

    error(r) = mean (D(alpha (x_0 + r z)) - x_0)^2   at the time where sigma / alpha = r

Training and held-out images get the same noise, so a difference between them was memorised.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from exact_resume.randomness import Draws, key
from sturdy.diffusion.sampler import Estimator
from sturdy.diffusion.space import Pixels, Space
from sturdy.encoders.images import ImageSet, scaled
from sturdy.evaluation.figures import image_table, log_chart
from sturdy.evaluation.report import Report

# Noise levels sigma / alpha, for x_0 in [-1, 1].
LEVELS = (0.05, 0.1, 0.2, 0.4, 0.7, 1.0, 1.5, 2.5, 5.0, 10.0, 30.0, 100.0)
FEW_LEVELS = (0.2, 0.7, 1.5)
NOISE_KINDS = ("gaussian", "uniform", "salt and pepper")  # all of mean 0 and variance 1
N_EXAMPLES = 12


class Estimate(NamedTuple):
    """A mean and its standard error."""

    mean: float
    error: float


def make_noise(draws: Draws, shape: Sequence[int], kind: str) -> Tensor:
    """Return noise ``(b, *shape)`` of one of ``NOISE_KINDS``."""
    if kind == "gaussian":
        return draws.normal("level", shape)
    if kind == "uniform":
        return math.sqrt(3) * (2 * draws.uniform("level", shape) - 1)
    if kind == "salt and pepper":  # one value in ten is hit
        u = draws.uniform("level", shape)
        return math.sqrt(10) * ((u < 0.05).float() - (u >= 0.95).float())
    raise ValueError(f"there is no noise of kind {kind!r}; there are: {', '.join(NOISE_KINDS)}")


class Denoising:
    """Adds noise to images and removes it in one step.

    The noise of an image depends only on its number in the set.

    Args:
        denoiser: the network.
        space: in which it works.
        device: of the network.
        batch_size: images at a time.
    """

    def __init__(
        self,
        denoiser: Estimator,
        space: Space | None = None,
        *,
        device: str = "cpu",
        batch_size: int = 50,
    ) -> None:
        self.denoiser = denoiser
        self.space = space or Pixels()
        self.device = device
        self.batch_size = batch_size
        self.encoded: dict[int, tuple[ImageSet, list[tuple[Tensor, Draws]]]] = {}

    def error(self, real: ImageSet, level: float, kind: str = "gaussian") -> Estimate:
        """Return the mean squared error of x_0."""
        errors = []
        for x0, _, estimate in self._denoise(real, level, kind):
            errors.append((estimate - x0).square().flatten(1).mean(1))
        each = torch.cat(errors)
        standard_error = each.std(correction=0).item() / math.sqrt(len(each))
        return Estimate(each.mean().item(), standard_error)

    def error_of_mean(self, train: ImageSet, held_out: ImageSet) -> float:
        """Return the error of the mean training image, as an estimate of the held-out images."""
        mean = torch.cat([x0 for x0, _ in self._encoded(train)]).mean(0)
        others = torch.cat([x0 for x0, _ in self._encoded(held_out)])
        return (others - mean).square().mean().item()

    def images(self, real: ImageSet, level: float) -> tuple[Tensor, Tensor]:
        """Return the images with noise, and the estimates, ``(n, c, h, w)`` each."""
        noisy, estimates = [], []
        for _, x, estimate in self._denoise(real, level, "gaussian"):
            noisy.append(self.space.decode(x.to(self.device)).cpu())
            estimates.append(self.space.decode(estimate.to(self.device)).cpu())
        return torch.cat(noisy), torch.cat(estimates)

    def _encoded(self, real: ImageSet) -> Iterable[tuple[Tensor, Draws]]:
        """Return x_0 and the draws of each batch; an autoencoder encodes each set once."""
        if isinstance(self.space, Pixels):
            return self._encode(real)
        if id(real) not in self.encoded:  # the set is kept, so that its id stays its own
            self.encoded[id(real)] = (real, list(self._encode(real)))
        return self.encoded[id(real)][1]

    def _encode(self, real: ImageSet) -> Iterator[tuple[Tensor, Draws]]:
        for first in range(0, len(real), self.batch_size):
            images = scaled(real.pixels[first : first + self.batch_size])
            draws = Draws(key("levels"), range(first, first + len(images)))
            yield self.space.encode(images.to(self.device), draws).cpu(), draws

    @torch.no_grad()
    def _denoise(
        self, real: ImageSet, level: float, kind: str
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield x_0, x_t / alpha and the estimate of x_0 of each batch."""
        schedule = self.denoiser.schedule
        t = schedule.time(torch.tensor([level], dtype=torch.float64))
        alpha, sigma = (coefficient.item() for coefficient in schedule(t))
        done = 0
        for x0, draws in self._encoded(real):
            labels = None
            if real.labels is not None:
                labels = real.labels[done : done + len(x0)].to(self.device)
            done += len(x0)
            x_t = alpha * x0 + sigma * make_noise(draws, x0.shape[1:], kind)
            times = t.float().expand(len(x0)).to(self.device)
            estimate = self.denoiser(x_t.to(self.device), times, labels).cpu()
            if self.space.clip is not None:
                estimate = estimate.clamp(*self.space.clip)
            yield x0, x_t / alpha if alpha else x_t, estimate


def psnr(error: float) -> float:
    """Return the peak signal-to-noise ratio of a mean squared error, in dB, for a range of 2."""
    return 10 * math.log10(4 / error) if error else math.inf


def denoising_error_section(
    report: Report, denoising: Denoising, train: ImageSet, held_out: ImageSet
) -> None:
    """Add a section on the errors by noise level, for other noise too, with examples."""
    report.heading("Loss by noise level")
    error_of_mean = denoising.error_of_mean(train, held_out)
    report.text(
        f"The mean squared error of denoising {len(train):,} training and {len(held_out):,} "
        f"held-out images in one step, by noise (sigma / alpha, of images in [-1, 1]). The "
        f"difference between held-out and training images was memorised. The mean training image, "
        f"as an estimate of the held-out images, has the error {error_of_mean:.5f}."
    )
    train_errors = [denoising.error(train, level) for level in LEVELS]
    held_out_errors = [denoising.error(held_out, level) for level in LEVELS]
    lines = {
        "training": [error.mean for error in train_errors],
        "held-out": [error.mean for error in held_out_errors],
    }
    report.numbers["levels"] = {"noise": list(LEVELS), **lines, "mean_image": error_of_mean}
    curves = {**lines, "the mean image": [error_of_mean] * len(LEVELS)}
    chart = log_chart(LEVELS, curves, xlabel="noise: sigma / alpha", ylabel="mean squared error")
    report.figure("levels.png", chart, "Mean squared error by noise")
    head = ["noise", "training", "held-out", "held-out / training"]
    head += ["PSNR with noise", "PSNR denoised, held-out"]
    rows = []
    for level, a, b in zip(LEVELS, train_errors, held_out_errors, strict=True):
        row = [f"{level:g}", f"{a.mean:.5f}", f"{b.mean:.5f}", _format_ratio(b, a)]
        rows.append([*row, f"{psnr(level**2):.1f} dB", f"{psnr(b.mean):.1f} dB"])
    report.table(head, rows)
    _warn_of_bad_levels(report, denoising, lines["held-out"], error_of_mean)
    _other_noise(report, denoising, held_out)
    _examples(report, denoising, held_out[:N_EXAMPLES])


def _warn_of_bad_levels(
    report: Report, denoising: Denoising, errors: Sequence[float], error_of_mean: float
) -> None:
    bad = [level for level, error in zip(LEVELS, errors, strict=True) if error > error_of_mean]
    if not bad:
        return
    schedule = denoising.denoiser.schedule
    time = schedule.time(torch.tensor([bad[0]], dtype=torch.float64)).item()
    report.text(
        f"At noise {', '.join(f'{level:g}' for level in bad)} the network is worse than the mean "
        f"image. Sampling that starts at these noise levels makes a bad first step: draw with a "
        f"sampler.start below {time:.2f}, or train there more often (objective.time)."
    )


def _other_noise(report: Report, denoising: Denoising, held_out: ImageSet) -> None:
    report.text(
        "The same network on held-out images, with noise of the same variance that it was never "
        "trained on:"
    )
    found = {}
    for kind in NOISE_KINDS:
        found[kind] = [psnr(denoising.error(held_out, level, kind).mean) for level in FEW_LEVELS]
    head = ["PSNR denoised", *(f"noise {level:g}" for level in FEW_LEVELS)]
    rows = [[kind, *(f"{value:.1f} dB" for value in values)] for kind, values in found.items()]
    report.table(head, rows)
    report.numbers["robustness"] = {"noise": list(FEW_LEVELS), **found}


def _examples(report: Report, denoising: Denoising, examples: ImageSet) -> None:
    rows, names = [scaled(examples.pixels)], ["image"]
    for level in FEW_LEVELS:
        rows += denoising.images(examples, level)
        names += [f"noise {level:g}", "estimate"]
    figure = image_table(torch.stack(rows), columns=[""] * len(examples), rows=names)
    report.figure("denoised.png", figure, "Held-out images, with noise, and the estimates")


def _format_ratio(b: Estimate, a: Estimate) -> str:
    """Format b / a with the standard error that follows from theirs."""
    if not a.mean or not b.mean:
        return "–"
    ratio = b.mean / a.mean
    return f"{ratio:.3f} ± {ratio * math.hypot(a.error / a.mean, b.error / b.mean):.3f}"
