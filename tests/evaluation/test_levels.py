"""Errors by noise level of a denoiser whose errors are known: of N(mu, s^2) it is s^2 r^2 / (s^2 +
r^2).
"""

import pytest
import torch

from exact_resume.randomness import Draws, generator
from sturdy.diffusion.schedule import Cosine, RectifiedFlow
from sturdy.encoders.images import ImageSet, scaled
from sturdy.evaluation.levels import (
    NOISE_KINDS,
    Denoising,
    denoising_error_section,
    make_noise,
    psnr,
)
from sturdy.evaluation.report import Report


class Wiener:
    """The best linear denoiser of pictures with one mean and variance; ``labels`` collects what it
    was told.
    """

    def __init__(self, schedule, pixels):
        self.schedule, self.labels = schedule, []
        self.mu, self.variance = scaled(pixels).mean(), scaled(pixels).var()

    def __call__(self, x_t, t, label):
        alpha, sigma = (c[:, None, None, None] for c in self.schedule(t))
        self.labels.append(label)
        gain = alpha * self.variance / (alpha**2 * self.variance + sigma**2)
        return self.mu + gain * (x_t - alpha * self.mu)


def pictures(n=60):
    levels = 140 + 20 * torch.randn(n, 3, 8, 8, generator=generator("levels"))
    return ImageSet(
        levels.round().clamp(0, 255).to(torch.uint8), torch.arange(n) % 5, torch.empty(n, 0), {}
    )


@pytest.mark.parametrize("kind", NOISE_KINDS)
def test_noise_has_mean_zero_and_variance_one(kind):
    z = make_noise(Draws(0, range(200)), (3, 8, 8), kind)
    assert abs(z.mean()) < 0.02
    assert z.var().item() == pytest.approx(1, abs=0.03)
    with pytest.raises(ValueError, match="salt and pepper"):
        make_noise(Draws(0, range(2)), (3, 8, 8), "pink")


@pytest.mark.parametrize("kind", NOISE_KINDS)
@pytest.mark.parametrize("ratio", [0.1, 0.4, 2.5])
@pytest.mark.parametrize(
    "schedule", [RectifiedFlow(), Cosine()], ids=lambda schedule: type(schedule).__name__
)
def test_errors_are_the_closed_form(schedule, ratio, kind):
    real = pictures()
    denoiser = Wiener(schedule, real.pixels)
    s, r = denoiser.variance.item(), ratio**2
    found, error = Denoising(denoiser, batch_size=17).error(real, ratio, kind)
    assert found == pytest.approx(s * r / (s + r), abs=4 * error)
    assert 0 < error < 0.03 * found
    assert torch.equal(torch.cat(denoiser.labels), real.labels)
    assert found == pytest.approx(
        Denoising(denoiser, batch_size=60).error(real, ratio, kind)[0], rel=1e-5
    )


def test_decibels():
    assert psnr(0.04) == pytest.approx(20)
    assert psnr(0) == float("inf")


def test_what_was_learned_by_heart_shows(tmp_path):
    """A denoiser that knows its training images has no error there, and one on others."""
    train, held_out = pictures()[:20], pictures()[20:40]

    class Knows(Wiener):
        def __call__(self, x_t, t, label):
            known = scaled(train.pixels)
            gaps = torch.cdist((x_t / (1 - t[:, None, None, None])).flatten(1), known.flatten(1))
            return known[gaps.argmin(1)]

    report = Report(tmp_path, "levels")
    denoising_error_section(
        report, Denoising(Knows(RectifiedFlow(), train.pixels)), train, held_out
    )
    found = report.numbers["levels"]
    assert found["training"][0] == 0 < found["held-out"][0]
    assert set(report.numbers["robustness"]) == {"noise", *NOISE_KINDS}
    said = report.write().read_text()
    assert "worse than the mean image" in said, "where it cannot see, it chooses one image"
    assert "a sampler.start below 0." in said
    assert (tmp_path / "levels.png").is_file()
    assert (tmp_path / "denoised.png").is_file()


def test_the_best_denoiser_is_never_worse_than_the_mean_image(tmp_path):
    train, held_out = pictures()[:30], pictures()[30:]
    report = Report(tmp_path, "levels")
    denoising_error_section(
        report, Denoising(Wiener(RectifiedFlow(), train.pixels)), train, held_out
    )
    found = report.numbers["levels"]
    assert found["held-out"] == sorted(found["held-out"])
    assert found["held-out"][-1] == pytest.approx(found["mean_image"], rel=0.05)
    assert "worse than the mean image" not in report.write().read_text()
