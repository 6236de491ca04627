"""Targets: there and back on every schedule, their definitions, and which pairs are refused."""

import pytest
import torch
from gaussian import IDEAL, PAIRS, REFUSED, SCHEDULES, TARGETS, posterior_mean
from torch import nn

from sturdy.diffusion import (
    Cosine,
    Denoiser,
    Noise,
    Preconditioned,
    RectifiedFlow,
    Schedule,
    V,
    VarianceExploding,
)
from sturdy.diffusion.target import config_name

RNG = torch.Generator().manual_seed(0)
X_0, EPS = torch.randn(2, 50, 3, 4, 4, generator=RNG, dtype=torch.float64)
T = torch.linspace(0.001, 1, 50, dtype=torch.float64)


def corrupted(schedule):
    alpha, sigma = (c[:, None, None, None] for c in schedule(T))
    return alpha * X_0 + sigma * EPS, alpha, sigma


def round_trip_error(target, schedule):
    x_t, alpha, sigma = corrupted(schedule)
    return (target.x0(target(X_0, EPS, alpha, sigma), x_t, alpha, sigma) - X_0).abs().max().item()


@pytest.mark.parametrize(("schedule", "target"), PAIRS)
def test_there_and_back(schedule, target):
    assert round_trip_error(TARGETS[target], SCHEDULES[schedule]) < 1e-10


def test_control_a_wrong_sign_does_not_come_back():
    class WrongV(V):
        def __call__(self, x0, noise, alpha, sigma):
            return alpha * noise + sigma * x0

    assert round_trip_error(WrongV(), SCHEDULES["cosine"]) > 1


@pytest.mark.parametrize(("schedule", "target"), PAIRS)
def test_ideal_prediction_means_the_posterior_mean(schedule, target):
    x_t, alpha, sigma = corrupted(SCHEDULES[schedule])
    x0 = TARGETS[target].x0(IDEAL[target](x_t, alpha, sigma), x_t, alpha, sigma)
    assert torch.allclose(x0, posterior_mean(x_t, alpha, sigma), atol=1e-10)


@pytest.mark.parametrize(("schedule", "target"), PAIRS)
def test_x0_factor_relates_the_two_errors(schedule, target):
    x_t, alpha, sigma = corrupted(SCHEDULES[schedule])
    target = TARGETS[target]
    prediction = target(X_0, EPS, alpha, sigma)
    moved = target.x0(prediction + EPS, x_t, alpha, sigma) - target.x0(
        prediction, x_t, alpha, sigma
    )
    factor = target.x0_factor(*SCHEDULES[schedule](T))
    assert factor.shape == (50,)
    assert torch.allclose(
        moved.square(), factor[:, None, None, None] * EPS.square(), rtol=1e-6, atol=1e-12
    )


def test_v_equals_diffusers():
    diffusers = pytest.importorskip("diffusers")
    index = torch.tensor([0, 129, 500, 998])
    theirs = diffusers.DDPMScheduler(beta_schedule="linear").get_velocity(X_0[:4], EPS[:4], index)
    alpha, sigma = (
        c[:, None, None, None] for c in SCHEDULES["linear"]((index.double() + 1) / 1000)
    )
    assert torch.allclose(TARGETS["v"](X_0[:4], EPS[:4], alpha, sigma), theirs.double(), atol=1e-5)


def test_edm_of_the_paper():
    """Karras et al. 2022, tab. 1, at sigma = sigma_data = 0.5, from what the target and its inputs
    do.
    """
    target, schedule = Preconditioned(sigma_data=0.5), VarianceExploding()
    alpha, sigma = (torch.tensor([c], dtype=torch.float64) for c in (1.0, 0.5))
    one, zero = (
        torch.ones(1, 1, 1, 1, dtype=torch.float64),
        torch.zeros(1, 1, 1, 1, dtype=torch.float64),
    )
    assert target.x0(zero, one, alpha, sigma).item() == pytest.approx(0.5)  # c_skip
    assert target.x0(one, zero, alpha, sigma).item() == pytest.approx(0.353553, rel=1e-5)  # c_out
    x, c_noise = target.inputs(one, schedule.time(sigma), schedule)
    assert x.item() == pytest.approx(1.414214, rel=1e-6)  # c_in
    assert c_noise.item() == pytest.approx(-0.173287, rel=1e-5)
    assert 1 / target.x0_factor(alpha, sigma).item() == pytest.approx(
        8
    )  # its weight on the error of x_0


def test_preconditioning_pictures_of_variance_1_on_a_circle_is_v():
    """c_skip = alpha and c_out = sigma: F = -v (Salimans & Ho 2022)."""
    alpha, sigma = (c[:, None, None, None] for c in Cosine()(T))
    f = Preconditioned(sigma_data=1.0)(X_0, EPS, alpha, sigma)
    assert torch.allclose(f, -V()(X_0, EPS, alpha, sigma), atol=1e-9)


def test_impossible_sigma_data_is_refused():
    with pytest.raises(ValueError, match=r"sigma_data=0 must be above 0"):
        Preconditioned(sigma_data=0)


def test_velocity_is_the_derivative_of_x_t():
    h = 1e-4
    at = [RectifiedFlow()(torch.tensor([t], dtype=torch.float64)) for t in (0.3 - h, 0.3 + h)]
    before, after = (alpha * X_0 + sigma * EPS for alpha, sigma in at)
    velocity = TARGETS["velocity"](X_0, EPS, *at[0])
    assert torch.allclose((after - before) / (2 * h), velocity, atol=1e-9)


@pytest.mark.parametrize(("schedule", "target"), sorted(REFUSED))
def test_refused_pairs_say_why_and_what_instead(schedule, target):
    with pytest.raises(
        ValueError,
        match=f"target={target} does not suit schedule={config_name(SCHEDULES[schedule])}: ",
    ) as error:
        Denoiser(nn.Identity(), SCHEDULES[schedule], TARGETS[target])
    reason = {"noise": "its alpha(1) is 0", "velocity": "only where alpha + sigma = 1"}
    advice = {
        "noise": "choose target=velocity, target=v",
        "velocity": "choose schedule=rectified_flow",
    }
    reason, advice = (
        reason.get(target, "its alpha(1) is 0"),
        advice.get(target, "choose target=velocity, target=v"),
    )
    if schedule == "variance_exploding" and target != "velocity":
        reason, advice = (
            "x_t grows to 80 times the size of an image",
            "choose target=preconditioned",
        )
    assert reason in str(error.value)
    assert advice in str(error.value)


@pytest.mark.parametrize(("schedule", "target"), PAIRS)
def test_sensible_pairs_build_even_on_meta(schedule, target):
    with torch.device("meta"):
        Denoiser(nn.Conv2d(3, 3, 1), SCHEDULES[schedule], TARGETS[target])


def test_refusal_looks_at_the_numbers_not_at_the_class():
    class ZeroTerminalSNR(Schedule):
        def __call__(self, t):
            angle = t * torch.pi / 2
            return torch.where(t == 1, 0, angle.cos()), angle.sin()

    with pytest.raises(ValueError, match="schedule=zero_terminal_snr"):
        Noise().check(ZeroTerminalSNR())
    V().check(ZeroTerminalSNR())
