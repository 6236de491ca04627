"""How well a denoiser denoises, by noise level: images it was trained on, held-out ones, and noise
of another kind.

    error(r) = mean (D(alpha (x + r z)) - x)^2   at the time where sigma / alpha = r

Training and held-out images get the same noise, so what differs between them is what was learned by
heart.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from exact_resume.randomness import Draws, key
from sturdy.diffusion.sampler import Estimator
from sturdy.encoders.pictures import ImageSet, scaled
from sturdy.evaluation.charts import chart
from sturdy.evaluation.report import Report
from sturdy.sampling.grids import grid

RATIOS = (
    0.05,
    0.1,
    0.2,
    0.4,
    0.7,
    1.0,
    1.5,
    2.5,
    5.0,
    10.0,
    30.0,
    100.0,
)  # noise to picture, which is in [-1, 1]
FEW = (0.2, 0.7, 1.5)
KINDS = ("gaussian", "uniform", "salt and pepper")  # all of mean 0 and variance 1


def noise(draws: Draws, shape: Sequence[int], kind: str) -> Tensor:
    """One of ``KINDS``, ``(b, *shape)``."""
    match kind:
        case "gaussian":
            return draws.normal("level", shape)
        case "uniform":
            return math.sqrt(3) * (2 * draws.uniform("level", shape) - 1)
        case "salt and pepper":  # one value in ten is hit
            u = draws.uniform("level", shape)
            return math.sqrt(10) * ((u < 0.05).float() - (u >= 0.95).float())
    raise ValueError(f"there is no noise of kind {kind!r}; there are: {', '.join(KINDS)}")


class Denoising:
    """Noise on pictures, taken off again in one step; the noise of a picture depends on its number
    in the set only.
    """

    def __init__(self, denoiser: Estimator, *, device: str = "cpu", batch: int = 50) -> None:
        self.denoiser, self.device, self.batch = denoiser, device, batch

    def error(self, real: ImageSet, ratio: float, kind: str = "gaussian") -> tuple[float, float]:
        """The mean squared error on the scale where pictures are in [-1, 1], and its standard
        error.
        """
        each = torch.cat(
            [(x - x0).square().flatten(1).mean(1) for x0, _, x in self._each(real, ratio, kind)]
        )
        return each.mean().item(), (each.std(correction=0) / math.sqrt(len(each))).item()

    def pictures(self, real: ImageSet, ratio: float) -> list[Tensor]:
        """Those with noise and those without it again, ``(n, c, h, w)`` each."""
        return [
            torch.cat(parts)
            for parts in list(zip(*self._each(real, ratio, "gaussian"), strict=True))[1:]
        ]

    @torch.no_grad()
    def _each(
        self, real: ImageSet, ratio: float, kind: str
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        schedule = self.denoiser.schedule
        t = schedule.time(torch.tensor([ratio], dtype=torch.float64))
        alpha, sigma = (coefficient.item() for coefficient in schedule(t))
        for first in range(0, len(real), self.batch):
            part = real[first : first + self.batch]
            x0, label = (
                scaled(part.pixels),
                None if part.labels is None else part.labels.to(self.device),
            )
            draws = Draws(key("levels"), range(first, first + len(part)))
            x_t = alpha * x0 + sigma * noise(draws, x0.shape[1:], kind)
            x = self.denoiser(x_t.to(self.device), t.float().expand(len(x0)).to(self.device), label)
            yield x0, x_t / alpha if alpha else x_t, x.cpu().clamp(-1, 1)


def _ratio(b: tuple[float, float], a: tuple[float, float]) -> str:
    """b / a with the standard error that follows from theirs."""
    if not a[0] or not b[0]:
        return "–"
    ratio = b[0] / a[0]
    return f"{ratio:.3f} ± {ratio * math.hypot(a[1] / a[0], b[1] / b[0]):.3f}"


def psnr(error: float) -> float:
    """Peak signal to noise of a mean squared error, in dB, for a range of 2."""
    return 10 * math.log10(4 / error) if error else math.inf


def denoising_error_section(
    report: Report, denoising: Denoising, train: ImageSet, held_out: ImageSet
) -> None:
    """Errors by noise level on training and held-out images, other noise, and pictures of it."""
    report.heading("Loss by noise level")
    nothing = (scaled(held_out.pixels) - scaled(train.pixels).mean(0)).square().mean().item()
    report.text(
        f"The mean squared error of denoising {len(train):,} training and {len(held_out):,} "
        f"held-out images in one "
        f"step, by noise (sigma / alpha, of pictures in [-1, 1]). Held-out above training is what "
        f"was learned by "
        f"heart. The mean training image, which sees nothing, errs by {nothing:.5f}."
    )
    found = {
        name: [denoising.error(real, ratio) for ratio in RATIOS]
        for name, real in (("training", train), ("held-out", held_out))
    }
    lines = {name: [mean for mean, _ in errors] for name, errors in found.items()}
    caption = "Mean squared error by noise"
    curves = {**lines, "the mean image": [nothing] * len(RATIOS)}
    report.picture(
        "levels.png", chart(RATIOS, curves, title=caption, across="noise / picture"), caption
    )
    report.table(
        [
            "noise",
            "training",
            "held-out",
            "held-out / training",
            "PSNR with noise",
            "PSNR denoised, held-out",
        ],
        [
            [
                f"{r:g}",
                f"{a[0]:.5f}",
                f"{b[0]:.5f}",
                _ratio(b, a),
                *(f"{psnr(e):.1f} dB" for e in (r * r, b[0])),
            ]
            for r, a, b in zip(RATIOS, *found.values(), strict=True)
        ],
    )
    worse = [
        f"{r:g}" for r, error in zip(RATIOS, lines["held-out"], strict=True) if error > nothing
    ]
    if worse:
        at = denoising.denoiser.schedule.time(
            torch.tensor([float(worse[0])], dtype=torch.float64)
        ).item()
        report.text(
            f"At noise {', '.join(worse)} the network is worse than the mean image, and walks that "
            f"start there begin "
            f"with a step astray: draw with a sampler.start below {at:.2f}, or train there more "
            f"often (objective.time)."
        )
    report.numbers["levels"] = {"noise": list(RATIOS), **lines, "mean_image": nothing}
    report.text(
        "The same network on held-out images with as much noise of kinds that it was never trained "
        "on:"
    )
    kinds = {
        kind: [psnr(denoising.error(held_out, ratio, kind)[0]) for ratio in FEW] for kind in KINDS
    }
    report.table(
        ["PSNR denoised", *(f"noise {ratio:g}" for ratio in FEW)],
        [[kind, *(f"{value:.1f} dB" for value in values)] for kind, values in kinds.items()],
    )
    report.numbers["robustness"] = {"noise": list(FEW), **kinds}
    shown = held_out[:12]
    strips = [strip for ratio in FEW for strip in denoising.pictures(shown, ratio)]
    caption = f"Held-out images; below with noise {', '.join(map(str, FEW))}, each followed by what is made of it"
    report.picture(
        "denoised.png",
        grid(torch.cat([scaled(shown.pixels), *strips]), columns=len(shown)),
        caption,
    )
