"""Samplers against closed forms (a Gaussian, a mixture) and against a second library, step by
step.
"""

import math
from itertools import pairwise, product

import pytest
import torch
from gaussian import PAIRS, SCHEDULES, TARGETS, Exact, Ideal, TwoPeaks, exact_walk
from torch import nn

from exact_resume.randomness import Draws
from sturdy.diffusion import (
    DDIM,
    DDPM,
    X0,
    Churn,
    Cosine,
    Denoiser,
    DPMSolver,
    Euler,
    Heun,
    Linear,
    UniPC,
    V,
    VarianceExploding,
    sample,
)

NOISE = torch.randn(16, 1, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
DRAWS = Draws("test", range(16))
SAMPLERS = {
    "DDPM": DDPM,
    "DDIM": DDIM,
    "Euler": Euler,
    "Heun": Heun,
    "2M": DPMSolver,
    "UniPC": UniPC,
    "Churn": Churn,
}


def ideal(schedule, target="x0"):
    return Denoiser(Ideal(schedule, target), SCHEDULES[schedule], TARGETS[target])


def last(sampler, denoiser, noise=NOISE, draws=None, clip=(-1, 1)):
    *_, step = sampler(denoiser, noise, None, draws, clip=clip)
    return step.x


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_euler_is_deterministic_ddim(schedule):
    exact = Exact(SCHEDULES[schedule])
    assert torch.allclose(last(Euler(13), exact), last(DDIM(13), exact), atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddim_with_eta_1_is_ddpm(schedule):
    exact = Exact(SCHEDULES[schedule])
    ddpm = last(DDPM(30), exact, draws=DRAWS, clip=None)
    ddim = last(DDIM(30, eta=1), exact, draws=DRAWS, clip=None)
    assert torch.allclose(ddpm, ddim, atol=1e-10)
    half = last(DDIM(30, eta=0.5), exact, draws=DRAWS, clip=None)
    assert not torch.allclose(half, ddim, atol=0.1)


def test_heun_in_sigma_on_variance_exploding():
    """Karras et al. 2022, alg. 1, as the paper has it."""
    denoiser, high, low = Exact(VarianceExploding()), 80 ** (1 / 7), 0.002 ** (1 / 7)
    sigmas = [(high + i / 9 * (low - high)) ** 7 for i in range(10)] + [0.0]

    def d(x, sigma):
        return (
            x - denoiser(x, VarianceExploding().time(torch.full((16,), sigma, dtype=torch.float64)))
        ) / sigma

    x = 80 * NOISE
    for sigma, after in pairwise(sigmas):
        slope = d(x, sigma)
        ahead = x + (after - sigma) * slope
        x = x + (after - sigma) * (slope + d(ahead, after)) / 2 if after > 0 else ahead
    assert torch.allclose(last(Heun(10, spacing="karras"), denoiser, clip=None), x, atol=1e-9)


def test_heun_in_t_on_rectified_flow():
    """Against the textbook: u at t, an Euler step, u there, the average of both."""
    n, denoiser = 10, ideal("rectified_flow")
    x = NOISE
    for i in range(n, 0, -1):
        t, s = i / n, (i - 1) / n
        u = (x - denoiser(x, torch.full((16,), t, dtype=torch.float64))) / t
        if s > 0:
            ahead = x + (s - t) * u
            u = (u + (ahead - denoiser(ahead, torch.full((16,), s, dtype=torch.float64))) / s) / 2
        x = x + (s - t) * u
    assert torch.allclose(last(Heun(n, power=1), denoiser, clip=None), x, atol=1e-12)


@pytest.mark.parametrize("sampler", [Heun, UniPC])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_walk_that_starts_later_is_the_exact_one_from_there(schedule, sampler):
    exact = Exact(SCHEDULES[schedule])
    ends = [exact_walk(exact.schedule, NOISE, start=start) for start in (0.7, 1.0)]
    early, whole = (last(sampler(100, start=start), exact, clip=None) for start in (0.7, 1.0))
    assert torch.allclose(early, ends[0], atol=0.03)
    assert torch.allclose(whole, ends[1], atol=0.03)
    times = [step.t for step in sampler(4, start=0.5)(exact, NOISE)]
    assert times == [t / 2 for t in (step.t for step in sampler(4)(exact, NOISE))]


@pytest.mark.parametrize("s", [0.1, 1.0, 4.0, 16.0])
def test_twenty_calls_that_keep_every_variance(s):
    """Even times do not, as many calls: what varies most comes out too even, and what varies least
    too.
    """

    def kept(sampler):
        exact = Exact(SCHEDULES["rectified_flow"], 0.0, s)
        return (last(sampler, exact, clip=None) / NOISE).mean().item() / s

    assert kept(UniPC(20, spacing="log_snr", start=0.99)) == pytest.approx(1, abs=0.02)
    assert (kept(Heun(10, power=1, start=0.99)) < 0.8) == (s in (0.1, 16.0))


def test_start_is_a_time():
    for start in (0.0, 1.01):
        with pytest.raises(ValueError, match=rf"start={start} must be a time above 0"):
            Heun(5, start=start)


@pytest.mark.parametrize("schedule", [Linear(), Cosine()])
def test_thousand_steps_of_ddpm_are_the_posterior_of_the_paper(schedule):
    """Ho et al. 2020, eqs. 6 and 7, from the betas; from the same states, step by step."""
    alpha_bar = torch.cat(
        [torch.ones(1), schedule(torch.arange(1, 1001).double() / 1000)[0].square()]
    )
    noise, draws = NOISE[:2, :, :4, :4], Draws(0, range(2))

    class Half(nn.Module):
        def forward(self, x, t, label):
            return x / 2

    x = schedule(torch.ones(1, dtype=torch.float64))[1] * noise
    for i, step in enumerate(
        DDPM()(Denoiser(Half(), schedule, X0()), noise, None, draws, clip=None)
    ):
        bar, bar_before = alpha_bar[1000 - i].item(), alpha_bar[999 - i].item()
        beta = 1 - bar / bar_before
        mean = (
            math.sqrt(bar_before) * beta / (1 - bar) * x / 2
            + math.sqrt(1 - beta) * (1 - bar_before) / (1 - bar) * x
        )
        variance = (1 - bar_before) / (1 - bar) * beta
        x = mean + math.sqrt(variance) * draws.normal(f"step {i}", (1, 4, 4)).double()
        assert torch.allclose(step.x, x, rtol=1e-9, atol=1e-12)
        assert step.t == pytest.approx(1 - (i + 1) / 1000)
        x = step.x
    assert i == 999


class Waves(nn.Module):
    """Some smooth function; as a model it is bad, which is what a comparison of formulas wants."""

    def forward(self, x, t, label):
        return torch.sin(3 * x + 5 * t[:, None, None, None])


THEIR_BETAS = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
THEIR_TARGET = {"noise": "epsilon", "x0": "sample", "v": "v_prediction"}


@pytest.mark.parametrize(("schedule", "target"), [*product(THEIR_BETAS, THEIR_TARGET)])
@pytest.mark.parametrize("eta", [0.0, 0.6])
@pytest.mark.parametrize("clip", [False, True])
def test_ddim_steps_equal_diffusers(schedule, target, eta, clip):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(
        beta_schedule=THEIR_BETAS[schedule],
        prediction_type=THEIR_TARGET[target],
        timestep_spacing="trailing",
        clip_sample=clip,
    )
    theirs.set_timesteps(20)
    # Their table is computed in float32; at alpha(1) = 5e-5 that alone would show.
    theirs.alphas_cumprod = SCHEDULES[schedule](torch.arange(1, 1001).double() / 1000)[0].square()
    denoiser = Denoiser(Waves(), SCHEDULES[schedule], TARGETS[target])
    noise, draws = NOISE[:3], Draws(0, range(3))

    x = SCHEDULES[schedule](torch.ones(1, dtype=torch.float64))[1] * noise
    steps = DDIM(20, eta=eta)(denoiser, noise, None, draws, clip=(-1, 1) if clip else None)
    for i, (index, step) in enumerate(zip(theirs.timesteps, steps, strict=True)):
        t = torch.full((3,), (index.item() + 1) / 1000, dtype=torch.float64)
        fresh = draws.normal(f"step {i}", (1, 16, 16)).double() if eta else None
        out = theirs.step(
            denoiser.predict(x, t),
            index,
            x,
            eta=eta,
            use_clipped_model_output=clip,
            variance_noise=fresh,
        )
        assert torch.allclose(step.x0, out.pred_original_sample, rtol=1e-6, atol=1e-6)
        assert torch.allclose(step.x, out.prev_sample, rtol=1e-6, atol=1e-6)
        x = step.x


@pytest.mark.parametrize(("schedule", "target"), [*product(THEIR_BETAS, THEIR_TARGET)])
def test_ddpm_steps_equal_diffusers(schedule, target):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(
        beta_schedule=THEIR_BETAS[schedule],
        prediction_type=THEIR_TARGET[target],
        timestep_spacing="trailing",
    )
    theirs.set_timesteps(20)
    theirs.alphas_cumprod = SCHEDULES[schedule](torch.arange(1, 1001).double() / 1000)[0].square()
    denoiser = Denoiser(Waves(), SCHEDULES[schedule], TARGETS[target])
    noise = NOISE[:3]

    class Theirs(Draws):
        """The noise that diffusers draws at its step i, when its generator is seeded with i."""

        def normal(self, purpose, shape=()):
            seed = int(purpose.removeprefix("step "))
            rng = torch.Generator().manual_seed(seed)
            return torch.randn(len(self), *shape, generator=rng, dtype=torch.float64)

    x = SCHEDULES[schedule](torch.ones(1, dtype=torch.float64))[1] * noise
    steps = DDPM(20)(denoiser, noise, None, Theirs(0, range(3)))
    for i, (index, step) in enumerate(zip(theirs.timesteps, steps, strict=True)):
        t = torch.full((3,), (index.item() + 1) / 1000, dtype=torch.float64)
        out = theirs.step(
            denoiser.predict(x, t), index, x, generator=torch.Generator().manual_seed(i)
        )
        assert torch.allclose(step.x, out.prev_sample, rtol=1e-6, atol=1e-6)
        x = step.x


@pytest.mark.parametrize("sampler", [DDPM(250), DPMSolver(40, eta=1), Churn(40)])
@pytest.mark.parametrize("schedule", ["rectified_flow", "linear", "variance_exploding"])
def test_random_walks_end_in_the_mixture(schedule, sampler):
    peaks = TwoPeaks(SCHEDULES[schedule])
    x = last(sampler, peaks, draws=DRAWS, clip=None)
    quantiles = peaks.cdf(x).flatten().sort().values
    uniform = (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096
    assert (
        quantiles - uniform
    ).abs().max().item() < 0.035  # Kolmogorov-Smirnov; 0.1 % of true samples exceed 0.030
    assert (x < 0).double().mean().item() == pytest.approx(0.3, abs=0.03)
    assert x.mean().item() == pytest.approx(TwoPeaks.MEAN, abs=0.03)
    assert x.std().item() == pytest.approx(TwoPeaks.STD, abs=0.02)


EVERY = [
    DDPM(10),
    DDIM(10),
    DDIM(10, eta=0.5),
    Euler(10),
    Heun(10),
    DPMSolver(10),
    DPMSolver(10, eta=1),
    UniPC(10),
]
EVERY += [Churn(10), UniPC(10, order=3)]


@pytest.mark.parametrize("sampler", EVERY, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize(("schedule", "target"), PAIRS)
def test_image_k_is_image_k_at_any_batch_size(schedule, target, sampler):
    denoiser = Denoiser(Waves(), SCHEDULES[schedule], TARGETS[target])
    noise = Draws(5, range(8)).normal("start", (1, 4, 4))
    whole = sample(sampler, denoiser, noise, draws=Draws(5, range(8)))
    halves = [
        sample(sampler, denoiser, noise[k], draws=Draws(5, range(8)[k]))
        for k in (slice(4), slice(4, 8))
    ]
    assert torch.allclose(whole, torch.cat(halves), atol=1e-4)
    assert whole.dtype == torch.float32
    assert whole.isfinite().all()
    assert whole.abs().max() <= 1


@pytest.mark.parametrize("sampler", [sampler(7) for sampler in SAMPLERS.values()], ids=SAMPLERS)
def test_steps_lead_to_the_picture(sampler):
    steps = list(sampler(ideal("linear"), NOISE, None, DRAWS))
    assert len(steps) == 7
    assert [step.t for step in steps] == sorted((step.t for step in steps), reverse=True)
    assert steps[-1].t == 0
    assert torch.allclose(
        steps[-1].x, steps[-1].x0, atol=1e-12
    )  # at t = 0 the state is the estimate
    assert all(step.x0.abs().max() <= 1 for step in steps)


def test_clipping_keeps_noise_prediction_stable():
    """A small error of eps at alpha(1) = 5e-5 is a huge one of x_0."""

    class Nearly(Ideal):
        def forward(self, x, t, label):
            return super().forward(x, t, label) + 0.01

    denoiser = Denoiser(Nearly("cosine", "noise"), SCHEDULES["cosine"], TARGETS["noise"])
    exact = exact_walk(SCHEDULES["cosine"], NOISE)
    assert (last(DDIM(50), denoiser) - exact).abs().mean() < 0.1
    assert (last(DDIM(50), denoiser, clip=None) - exact).abs().mean() > 1


def test_no_gradients_are_kept_and_callers_keep_theirs():
    class Learned(nn.Conv2d):
        def forward(self, x, t, label):
            return super().forward(x)

    denoiser = Denoiser(Learned(1, 1, 3, padding=1), Cosine(), V())
    noise = NOISE.float().requires_grad_()
    for step in Heun(3)(denoiser, noise):
        assert not step.x.requires_grad
        assert not step.x0.requires_grad
        assert torch.is_grad_enabled()
    with torch.inference_mode():
        inferred = sample(Heun(3), denoiser, noise)
    assert torch.equal(inferred, sample(Heun(3), denoiser, noise))


@pytest.mark.parametrize("sampler", [DDPM(5), DDIM(5, eta=0.5)])
def test_random_samplers_ask_for_draws_before_they_walk(sampler):
    name = type(sampler).__name__
    with pytest.raises(
        ValueError, match=f"{name} adds noise and needs draws for 16 samples, got none"
    ):
        sampler(ideal("cosine"), NOISE)
    with pytest.raises(ValueError, match=r"got some for 1; pass draws=Draws\(seed, positions\)"):
        sampler(ideal("cosine"), NOISE, None, Draws(0, [0]))


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match=r"steps=0 must be 1 or more"):
        Euler(0)
    with pytest.raises(ValueError, match=r"power=0 must be above 0"):
        Heun(10, power=0)
    with pytest.raises(ValueError, match=r"eta=1.5 must be from 0"):
        DDIM(10, eta=1.5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", SAMPLERS)
def test_gpu_walks_where_the_cpu_walks(name):
    walk = SAMPLERS[name](20)
    here = sample(walk, ideal("cosine", "v"), NOISE.float(), draws=DRAWS)
    there = sample(walk, ideal("cosine", "v").cuda(), NOISE.float().cuda(), draws=DRAWS)
    assert torch.allclose(here, there.cpu(), atol=1e-4)
