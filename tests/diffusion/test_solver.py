"""Solvers for few steps against a second library, step by step, and against the papers'
algorithms.
"""

import math
from itertools import product

import pytest
import torch
from gaussian import SCHEDULES, TARGETS, Exact, TwoPeaks, exact_walk
from torch import nn

from exact_resume.randomness import Draws
from sturdy.diffusion import (
    Churn,
    Denoiser,
    DPMSolver,
    Euler,
    Heun,
    Preconditioned,
    RectifiedFlow,
    UniPC,
    VarianceExploding,
)

NOISE = torch.randn(16, 1, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
DRAWS = Draws("test", range(16))
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # in diffusers


class Waves(nn.Module):
    """Some smooth function; as a model it is bad, which is what a comparison of formulas wants."""

    def forward(self, x, t, label):
        return torch.sin(3 * x + 5 * t[:, None, None, None])


def last(sampler, denoiser, noise=NOISE, draws=None, clip=(-1, 1)):
    *_, step = sampler(denoiser, noise, None, draws, clip=clip)
    return step.x


THEIR_BETAS = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
THEIR_TARGET = {"noise": "epsilon", "x0": "sample", "v": "v_prediction"}
SOLVERS = {
    "2M": (lambda n: DPMSolver(n, power=1), "DPMSolverMultistepScheduler", {}),
    "2M SDE": (
        lambda n: DPMSolver(n, eta=1, power=1),
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++"},
    ),
    "UniPC-1": (
        lambda n: UniPC(n, order=1, power=1),
        "UniPCMultistepScheduler",
        {"solver_order": 1},
    ),
    "UniPC-2": (
        lambda n: UniPC(n, order=2, power=1),
        "UniPCMultistepScheduler",
        {"solver_order": 2},
    ),
    "UniPC-3": (
        lambda n: UniPC(n, order=3, power=1),
        "UniPCMultistepScheduler",
        {"solver_order": 3},
    ),
}


@pytest.mark.parametrize(("schedule", "target"), [*product(THEIR_BETAS, THEIR_TARGET)])
@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("n", [10, 20])
def test_steps_equal_diffusers(schedule, target, name, n):
    """On the same network; theirs computes its coefficients in float32."""
    diffusers = pytest.importorskip("diffusers")
    ours, scheduler, options = SOLVERS[name]
    theirs = getattr(diffusers, scheduler)(
        beta_start=0.00085 if schedule == "scaled_linear" else 0.0001,
        beta_end=0.012 if schedule == "scaled_linear" else 0.02,
        beta_schedule=THEIR_BETAS[schedule],
        prediction_type=THEIR_TARGET[target],
        timestep_spacing="trailing",
        **options,
    )
    theirs.alphas_cumprod = SCHEDULES[schedule](torch.arange(1, 1001).double() / 1000)[0].square()
    theirs.set_timesteps(n)
    denoiser = Denoiser(Waves(), SCHEDULES[schedule], TARGETS[target])
    noise, draws = NOISE[:3], Draws(0, range(3))
    x = SCHEDULES[schedule](torch.ones(1, dtype=torch.float64))[1] * noise
    for i, (index, step) in enumerate(
        zip(theirs.timesteps, ours(n)(denoiser, noise, None, draws, clip=None), strict=True)
    ):
        t = torch.full((3,), (index.item() + 1) / 1000, dtype=torch.float64)
        fresh = (
            {"variance_noise": draws.normal(f"step {i}", (1, 16, 16)).double()}
            if name == "2M SDE"
            else {}
        )
        x = theirs.step(denoiser.predict(x, t), index, x, **fresh).prev_sample.double()
        scale = step.x.abs().max().item()  # up to 1e4 where a wild eps meets alpha = 5e-5
        assert torch.allclose(step.x, x, rtol=1e-3, atol=3e-4 * max(scale, 1)), i
        x = step.x if name.startswith("2M") else x  # UniPC keeps states of its own


def test_control_another_order_is_not_theirs():
    denoiser = Denoiser(Waves(), SCHEDULES["cosine"], TARGETS["v"])
    two, three = (last(UniPC(10, order=order, power=1), denoiser) for order in (2, 3))
    assert not torch.allclose(two, three, atol=1e-2)


EDM_SOLVERS = {
    "Euler": (Euler(12, spacing="karras"), "EDMEulerScheduler", {}),
    "2M": (DPMSolver(12, spacing="karras"), "EDMDPMSolverMultistepScheduler", {}),
    "2M log-SNR": (
        DPMSolver(12, spacing="log_snr"),
        "EDMDPMSolverMultistepScheduler",
        {"sigma_schedule": "exponential"},
    ),
}


@pytest.mark.parametrize("name", EDM_SOLVERS)
def test_edm_equals_diffusers(name):
    """Preconditioning and steps; the network is handed c_in x and c_noise by both."""
    diffusers = pytest.importorskip("diffusers")
    ours, scheduler, options = EDM_SOLVERS[name]
    theirs = getattr(diffusers, scheduler)(sigma_data=0.4, **options)
    theirs.set_timesteps(12)
    network = Waves()
    denoiser = Denoiser(network, VarianceExploding(), Preconditioned(sigma_data=0.4))
    x = 80 * NOISE
    for c_noise, step in zip(theirs.timesteps, ours(denoiser, NOISE, clip=None), strict=True):
        prediction = network(theirs.scale_model_input(x, c_noise), c_noise.expand(16), None)
        x = theirs.step(prediction, c_noise, x).prev_sample.double()
        assert torch.allclose(step.x, x, rtol=1e-4, atol=1e-4)


def test_churn_is_the_papers_algorithm_2():
    """Karras et al. 2022, alg. 2, written down in sigma; S_churn 12 in 20 steps, so gamma = 0.41 is
    the limit's.
    """
    denoiser = Denoiser(Waves(), VarianceExploding(), Preconditioned())

    def d(x, sigma):
        t = VarianceExploding().time(torch.full((16,), sigma, dtype=torch.float64))
        return (x - denoiser(x, t)) / sigma

    for churn in (2.0, 12.0):
        sampler = Churn(20, churn=churn, lowest=0.1, highest=30, inflation=1.01)
        high, low, x = 80 ** (1 / 7), 0.002 ** (1 / 7), 80 * NOISE
        sigmas = [(high + i / 19 * (low - high)) ** 7 for i in range(20)] + [0.0]
        for i, step in enumerate(sampler(denoiser, NOISE, None, DRAWS, clip=None)):
            gamma = min(churn / 20, math.sqrt(2) - 1) if 0.1 <= sigmas[i] <= 30 else 0
            raised = sigmas[i] * (1 + gamma)
            fresh = DRAWS.normal(f"step {i}", (1, 16, 16)).double()
            x = x + math.sqrt(raised**2 - sigmas[i] ** 2) * 1.01 * fresh
            slope = d(x, raised)
            ahead = x + (sigmas[i + 1] - raised) * slope
            if sigmas[i + 1] > 0:
                ahead = x + (sigmas[i + 1] - raised) * (slope + d(ahead, sigmas[i + 1])) / 2
            x = ahead
            assert torch.allclose(step.x, x, rtol=1e-6, atol=1e-7), i


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_without_noise_random_samplers_are_their_deterministic_selves(schedule):
    churn, heun = Churn(15, churn=0), Heun(15, spacing="karras")
    assert torch.equal(last(churn, Exact(schedule)), last(heun, Exact(schedule)))
    assert not torch.allclose(
        last(Churn(15), Exact(schedule), draws=DRAWS), last(heun, Exact(schedule)), atol=0.05
    )


def test_the_first_step_and_the_last_are_of_order_one():
    for sampler in (DPMSolver(2, power=1), UniPC(2, power=1)):
        first, _ = sampler(Exact(SCHEDULES["cosine"]), NOISE)
        expected, _ = Euler(2)(Exact(SCHEDULES["cosine"]), NOISE)
        assert torch.allclose(first.x, expected.x, atol=1e-12)
    euler = last(Euler(1), Exact(SCHEDULES["cosine"]))
    assert torch.allclose(last(DPMSolver(1), Exact(SCHEDULES["cosine"])), euler, atol=1e-12)
    assert torch.allclose(last(UniPC(1, order=3), Exact(SCHEDULES["cosine"])), euler, atol=1e-12)


@pytest.mark.parametrize("n", [10, 15])
def test_few_steps_are_enough(n):
    """On the mixture, the mean quantile is off by less than 0.75 of Heun's at as many calls, and
    0.4 of Euler's.
    """
    peaks = TwoPeaks(RectifiedFlow())

    def off(sampler):
        return peaks.off(last(sampler, peaks, NOISE[:4], clip=None), NOISE[:4]).mean().item()

    heun, euler = off(Heun((n + 1) // 2)), off(Euler(n))
    for sampler in (DPMSolver(n), UniPC(n)):
        assert off(sampler) < 0.75 * heun
        assert off(sampler) < 0.4 * euler


def test_draws_are_asked_for_only_where_noise_is_added():
    for sampler in (DPMSolver(5, eta=1), DPMSolver(5, eta=0.3), Churn(5)):
        with pytest.raises(
            ValueError, match=f"{type(sampler).__name__} adds noise and needs draws for 16 samples"
        ):
            sampler(Exact(RectifiedFlow()), NOISE)
    for sampler in (DPMSolver(5), UniPC(5), Churn(5, churn=0)):
        expected = exact_walk(RectifiedFlow(), NOISE)
        assert (last(sampler, Exact(RectifiedFlow())) - expected).abs().mean() < 0.2


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match=r"eta=-1 must be 0"):
        DPMSolver(10, eta=-1)
    with pytest.raises(ValueError, match=r"order=4 must be 1, 2 or 3"):
        UniPC(10, order=4)
    with pytest.raises(ValueError, match=r"churn=-1 must be 0"):
        Churn(10, churn=-1)
