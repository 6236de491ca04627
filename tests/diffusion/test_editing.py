"""Inpainting and image-to-image against what a Gaussian allows to know."""

from copy import copy

import pytest
import torch
from gaussian import MU, SCHEDULES, Exact, S, exact_walk

from exact_resume.randomness import Draws
from sturdy.diffusion import (
    DDIM,
    DDPM,
    Churn,
    DPMSolver,
    Euler,
    Heun,
    RectifiedFlow,
    UniPC,
    image_to_image,
    inpaint,
    sample,
)
from sturdy.diffusion.editing import InpaintingDenoiser

NOISE = torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
PICTURE = (
    torch.rand(8, 1, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2
    - 1
)
DRAWS = Draws("test", range(8))
LEFT = torch.arange(16) < 8  # is painted
SAMPLERS = [
    DDPM(30),
    DDIM(30),
    DDIM(30, eta=1),
    Euler(30),
    Heun(30),
    DPMSolver(30),
    DPMSolver(30, eta=1),
    UniPC(30),
]
SAMPLERS += [Churn(30)]
IDS = [f"{type(s).__name__}{'-random' if s.random else ''}" for s in SAMPLERS]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=IDS)
@pytest.mark.parametrize("schedule", ["rectified_flow", "scaled_linear", "variance_exploding"])
def test_what_is_kept_is_kept_and_what_is_painted_is_drawn(schedule, sampler):
    """Pixels of this Gaussian know nothing of each other: the painted ones are drawn as if
    alone.
    """
    denoiser = Exact(SCHEDULES[schedule])
    x = inpaint(sampler, denoiser, NOISE, PICTURE, LEFT, draws=DRAWS)
    assert torch.allclose(x[..., 8:], PICTURE[..., 8:], atol=1e-9)
    assert torch.allclose(
        x[..., :8], sample(sampler, denoiser, NOISE, draws=DRAWS)[..., :8], atol=1e-12
    )


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_known_pixels_follow_the_forward_process_of_their_own_noise(schedule):
    """That is replacement at every step: alpha picture + sigma noise, up to the start, where
    alpha(1) is neglected.
    """
    start = schedule(torch.ones(1, dtype=torch.float64))
    neglected = (start[0] / start[1]).item()
    inpainted = InpaintingDenoiser(Exact(schedule), PICTURE, torch.zeros(1))
    for step in DPMSolver(12)(inpainted, NOISE):
        alpha, sigma = (c.item() for c in schedule(torch.tensor([step.t], dtype=torch.float64)))
        assert torch.allclose(
            step.x, alpha * PICTURE + sigma * NOISE, atol=1e-9 + 1.01 * neglected * sigma
        )


class Pair:
    """Pictures of two pixels from N(0, s^2) with correlation 0.9."""

    COVARIANCE = S**2 * torch.tensor([[1, 0.9], [0.9, 1]], dtype=torch.float64)

    def __init__(self, schedule):
        self.schedule = schedule

    def __call__(self, x, t, label=None):
        alpha, sigma = (c[0].item() for c in self.schedule(t))
        of_x_t = alpha**2 * self.COVARIANCE + sigma**2 * torch.eye(2, dtype=torch.float64)
        return x @ (alpha * self.COVARIANCE @ torch.linalg.inv(of_x_t)).T


class Silence(Draws):
    def normal(self, purpose, shape=()):
        return torch.zeros(len(self), *shape, dtype=torch.float64)


LISTENING = {
    "2M": (DPMSolver(15), 0.46),
    "Heun": (Heun(50), 0.45),
    "SDE": (DPMSolver(25, eta=1), 0.64),
}
LISTENING |= {
    "DDPM": (DDPM(100), 0.61),
    "Churn": (Churn(50), 0.61),
    "much Churn": (Churn(200, churn=80), 0.76),
}


@pytest.mark.parametrize("name", LISTENING)
def test_what_is_painted_listens_to_what_is_kept_but_too_little(name):
    """Exactly, the mean of one pixel is 0.9 of the other: the limit of replacement, as measured in
    docs/measurements/samplers.md.

    All is linear, so that a walk without any noise ends at the mean.
    """
    sampler, follows = LISTENING[name]
    nothing, picture = torch.zeros(1, 1, 1, 2).double(), torch.tensor([[[[0.0, 0.5]]]]).double()
    mask, draws = torch.tensor([True, False]), Silence(0, [0])
    x = inpaint(sampler, Pair(RectifiedFlow()), nothing, picture, mask, draws=draws)
    assert x[0, 0, 0, 0].item() / 0.5 == pytest.approx(follows, abs=0.015)


@pytest.mark.parametrize("sampler", [DDIM(200), Heun(60), DPMSolver(60)])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("strength", [0.2, 0.7])
def test_image_to_image_ends_where_the_exact_walk_from_there_ends(schedule, sampler, strength):
    """From x_t = alpha picture + sigma noise the Gaussian's walk keeps the number of standard
    deviations.
    """
    alpha, sigma = (c.item() for c in schedule(torch.tensor([strength], dtype=torch.float64)))
    spread = (alpha**2 * S**2 + sigma**2) ** 0.5
    x_t = alpha * PICTURE / 2 + sigma * NOISE
    expected = MU + S * (x_t - alpha * MU) / spread
    x = image_to_image(sampler, Exact(schedule), NOISE, PICTURE / 2, strength, clip=None)
    assert torch.allclose(x, expected, atol=0.06 if isinstance(sampler, DDIM) else 0.02)
    elsewhere = copy(sampler)
    elsewhere.start = 0.8
    again = image_to_image(elsewhere, Exact(schedule), NOISE, PICTURE / 2, strength, clip=None)
    assert torch.equal(again, x)
    assert elsewhere.start == 0.8


@pytest.mark.parametrize(
    "sampler", [s for s in SAMPLERS if s.random], ids=lambda s: type(s).__name__
)
def test_image_to_image_with_random_samplers(sampler):
    x = image_to_image(sampler, Exact(RectifiedFlow()), NOISE, PICTURE / 2, 0.9, draws=DRAWS)
    assert x.mean().item() == pytest.approx(MU, abs=0.05)
    assert x.std().item() == pytest.approx(S, rel=0.25)


def test_strength_runs_from_the_picture_to_no_picture():
    ours = [
        image_to_image(Heun(20), Exact(RectifiedFlow()), NOISE, PICTURE / 2, strength, clip=None)
        for strength in (1e-3, 1.0)
    ]
    assert torch.allclose(ours[0], PICTURE / 2, atol=0.02)
    assert torch.allclose(ours[1], exact_walk(RectifiedFlow(), NOISE), atol=0.02)


def test_impossible_edits_are_refused():
    for strength in (0, -1, 1.1):
        with pytest.raises(ValueError, match=rf"strength={strength} must be above 0"):
            image_to_image(Heun(5), Exact(RectifiedFlow()), NOISE, PICTURE, strength)
    with pytest.raises(
        ValueError, match=r"a mask of shape \(3, 1, 1\) does not fit images \(8, 1, 16, 16\)"
    ):
        InpaintingDenoiser(Exact(RectifiedFlow()), PICTURE, torch.ones(3, 1, 1))
    for value in (0.5, 255, -1):
        with pytest.raises(
            ValueError, match="the mask must be 0 \\(kept\\) or 1 \\(painted\\) everywhere"
        ):
            InpaintingDenoiser(Exact(RectifiedFlow()), PICTURE, torch.full((16, 16), value))
