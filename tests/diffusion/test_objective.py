"""The objective: its floor on Gaussian data, its weights, and that a sample depends on its position
alone.
"""

import math

import pytest
import torch
from gaussian import PAIRS, SCHEDULES, TARGETS, posterior_mean, posterior_noise
from torch import nn

from exact_resume.randomness import Draws
from sturdy.diffusion import (
    X0,
    Constant,
    Cosine,
    Denoiser,
    LogitNormal,
    LogNormal,
    MinSNR,
    Noise,
    Objective,
    Preconditioned,
    RectifiedFlow,
    Sigmoid,
    Time,
    Uniform,
    V,
    VarianceExploding,
    Velocity,
)
from sturdy.diffusion.objective import Discrete

PICTURES = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
LABEL = torch.arange(8) % 4


class At(Time):
    """Always the same time."""

    def __init__(self, t):
        self.t = t

    def __call__(self, draws, schedule):
        return torch.full((len(draws),), self.t)


class Small(nn.Module):
    """A backbone that uses all it is given and notes the labels."""

    def __init__(self, num_classes=4):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.colour = nn.Embedding(num_classes + 1, 3)
        self.labels = []

    def forward(self, x, t, label):
        self.labels.append(label)
        return self.conv(x) + t[:, None, None, None] + self.colour(label)[:, :, None, None]


def small(schedule=None, target=None):
    return Denoiser(Small(), schedule or Cosine(), target or V(), num_classes=4)


class FlowOf(nn.Module):
    """The ideal velocity for N(0, s^2), times a factor."""

    def __init__(self, s, factor=1.0):
        super().__init__()
        self.s, self.factor = s, factor

    def forward(self, x, t, label):
        where = 1 - t[:, None, None, None], t[:, None, None, None]
        velocity = posterior_noise(x, *where, 0, self.s) - posterior_mean(x, *where, 0, self.s)
        return self.factor * velocity


@pytest.mark.parametrize(("t", "floor"), [(0.1, 1.17647), (0.5, 0.8), (0.9, 0.307692)])
def test_flow_matching_reaches_its_floor_and_no_wrong_answer_does(t, floor):
    """s^2 / ((1 - t)^2 s^2 + t^2) for s = 0.5; 98,304 pixels put the standard error below 0.5 %."""
    x0 = 0.5 * torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    draws = Draws(0, range(32))

    def loss(factor):
        denoiser = Denoiser(FlowOf(0.5, factor), RectifiedFlow(), Velocity())
        return Objective(time=At(t))(denoiser, x0, None, draws).mean().item()

    assert loss(1.0) == pytest.approx(floor, rel=0.02)
    if (
        t != 0.1
    ):  # where noise and data are equally hard to tell, u is 0 on average: no factor changes it
        assert loss(1.3) > 1.02 * floor


@pytest.mark.parametrize(("schedule", "target"), PAIRS)
def test_loss_is_the_equation(schedule, target):
    denoiser = small(SCHEDULES[schedule], TARGETS[target])
    draws = Draws(7, range(8))
    loss = Objective(label_drop=0)(denoiser, PICTURES, LABEL, draws)
    t, eps = 1 - draws.uniform("time"), draws.normal("noise", (3, 8, 8))
    for i in range(8):
        alpha, sigma = denoiser.schedule(t[i : i + 1])
        x_t = alpha * PICTURES[i : i + 1] + sigma * eps[i : i + 1]
        y = denoiser.target(PICTURES[i], eps[i], alpha, sigma)
        x, time = denoiser.target.inputs(x_t, t[i : i + 1], denoiser.schedule)
        error = denoiser.backbone(x, time, LABEL[i : i + 1])[0] - y
        assert loss[i].item() == pytest.approx(error.square().mean().item(), rel=1e-4)


def test_min_snr_closed_forms():
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    alpha, sigma = Cosine()(t)
    snr = alpha.square() / sigma.square()
    clipped = snr.clamp(max=5)
    weight = MinSNR(gamma=5)
    for target, expected in [(Noise(), clipped / snr), (X0(), clipped), (V(), clipped / (snr + 1))]:
        assert torch.allclose(weight(target, Cosine(), t), expected, rtol=1e-9)
    expected = ((1 - t) / t).square().clamp(max=5) * t.square()
    assert torch.allclose(weight(Velocity(), RectifiedFlow(), t), expected, rtol=1e-9)


def test_sigmoid_closed_forms():
    """On a straight line l = 2 log((1 - t) / t), -dl/dt = 2 / (t (1 - t)), and the noise's error is
    (1 - t) u's.
    """
    t = torch.linspace(0.001, 1, 1000, dtype=torch.float64)
    for bias in (-3.0, 0.0, 2.0):
        gate = torch.sigmoid(bias - 2 * (1 / t - 1).log())
        expected = gate * (1 - t) / t
        assert torch.allclose(
            Sigmoid(bias=bias)(Velocity(), RectifiedFlow(), t), expected, rtol=1e-6
        )
        assert torch.allclose(
            Sigmoid(bias=bias)(X0(), RectifiedFlow(), t), expected / t**2, rtol=1e-6
        )
    assert Sigmoid()(Velocity(), RectifiedFlow(), torch.tensor([2.0**-24, 1.0])).isfinite().all()


def test_sigmoid_is_the_same_integral_under_every_schedule():
    """Of an error of the noise that is a bell around l = bias, where the sigmoid averages 1/2:
    sqrt(8 pi) / 4.

    The control is MinSNR, whose integral depends on the schedule."""

    def integral(weight, schedule):
        t = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
        alpha, sigma = schedule(t)
        level = 2 * (alpha / sigma).log()
        error = torch.exp(
            -((level - 1) ** 2) / 8
        )  # nothing at both ends, which not all schedules reach
        return (weight(X0(), schedule, t) * (sigma / alpha).square() * error).mean().item()

    for schedule in SCHEDULES.values():
        assert integral(Sigmoid(bias=1), schedule) == pytest.approx(
            math.sqrt(8 * math.pi) / 4, rel=2e-3
        )
    assert integral(MinSNR(), SCHEDULES["rectified_flow"]) > 1.1 * integral(
        MinSNR(), SCHEDULES["linear"]
    )


@pytest.mark.parametrize("weight", [MinSNR(), Constant()])
def test_min_snr_weighs_the_error_of_x0_whatever_the_target(weight):
    """min(s, 5) |D - x_0|^2 in every space; the control, a constant weight, must differ between
    targets.
    """

    def losses(target):
        class Same(nn.Module):
            """The same, poor, estimate of x_0 in terms of any target: half of x_t."""

            def forward(self, x, t, label):
                alpha, sigma = (c[:, None, None, None] for c in Cosine()(t))
                return target(x / 2, (x - alpha * x / 2) / sigma, alpha, sigma)

        objective = Objective(weight=weight)
        return objective(Denoiser(Same(), Cosine(), target), PICTURES, None, Draws(0, range(8)))

    draws = Draws(0, range(8))
    t = Uniform()(draws, Cosine())
    alpha, sigma = (c[:, None, None, None] for c in Cosine()(t))
    error = (alpha * PICTURES + sigma * draws.normal("noise", (3, 8, 8))) / 2 - PICTURES
    expected = (alpha / sigma).square().flatten().clamp(max=5) * error.square().mean((1, 2, 3))
    agree = [torch.allclose(losses(target), expected, rtol=1e-3) for target in (Noise(), X0(), V())]
    assert agree == ([True] * 3 if isinstance(weight, MinSNR) else [False] * 3)


def test_times():
    draws, schedule = Draws(0, range(4000)), RectifiedFlow()
    uniform = Uniform()(draws, schedule)
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.02)
    assert uniform.var().item() == pytest.approx(1 / 12, abs=0.005)
    logit = LogitNormal(mean=-0.5, std=1.2)(draws, schedule).logit()
    assert logit.mean().item() == pytest.approx(-0.5, abs=0.06)
    assert logit.std().item() == pytest.approx(1.2, abs=0.05)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_log_normal_is_that_of_the_noise_level_under_every_schedule(schedule):
    t = LogNormal()(Draws(0, range(4000)), schedule).double()
    alpha, sigma = schedule(t)
    level = (sigma / alpha).log()
    assert level.mean().item() == pytest.approx(-1.2, abs=0.06)
    assert level.std().item() == pytest.approx(1.2, abs=0.05)
    kept = t[:50]
    assert torch.equal(LogNormal()(Draws(0, range(50)), schedule).double(), kept)


def test_log_normal_on_a_straight_line_is_logit_normal():
    draws = Draws(0, range(100))
    ours = LogNormal(mean=0.3, std=0.9)(draws, RectifiedFlow())
    assert torch.allclose(ours, LogitNormal(mean=0.3, std=0.9)(draws, RectifiedFlow()), atol=1e-6)


class Silent(nn.Module):
    def forward(self, x, t, label):
        return torch.zeros_like(x)


@pytest.mark.parametrize("schedule", ["variance_exploding", "linear", "cosine", "shifted_cosine"])
@pytest.mark.parametrize("t", [2.0**-24, 0.01, 0.2, 0.5, 0.8, 1.0])
def test_a_silent_edm_network_has_loss_1_at_every_noise_level(schedule, t):
    """On N(0, sigma_data^2); 98,304 pixels put the standard error below 0.5 %. The control is other
    data.
    """
    data = torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    denoiser = Denoiser(Silent(), SCHEDULES[schedule], Preconditioned(sigma_data=0.4))

    def loss(x0):
        return Objective(time=At(t))(denoiser, x0, None, Draws(0, range(32))).mean().item()

    assert loss(0.4 * data) == pytest.approx(1, rel=0.02)
    if t > 0.1:
        assert abs(loss(0.6 * data) - 1) > 0.02


def test_edm_weighs_the_error_of_x0_as_in_the_paper():
    """(sigma^2 + s^2) / (sigma s)^2 |D - x_0|^2 (Karras et al. 2022, tab. 1)."""

    class Half(nn.Module):
        def forward(self, x, t, label):
            return x / 2

    denoiser = Denoiser(Half(), VarianceExploding(), Preconditioned())
    draws = Draws(0, range(8))
    loss = Objective(time=LogNormal())(denoiser, PICTURES, None, draws)
    t = LogNormal()(draws, VarianceExploding())
    sigma = VarianceExploding()(t)[1]
    x0 = denoiser(PICTURES + sigma[:, None, None, None] * draws.normal("noise", (3, 8, 8)), t)
    expected = (sigma**2 + 0.25) / (sigma * 0.5) ** 2 * (x0 - PICTURES).square().mean((1, 2, 3))
    assert torch.allclose(loss, expected, rtol=1e-3)


EXTREMES = [option(mean=mean) for option in (LogitNormal, LogNormal) for mean in (-1000, 0, 1000)]


@pytest.mark.parametrize("time", [Uniform(), *EXTREMES])
@pytest.mark.parametrize("weight", [MinSNR(), Sigmoid()])
@pytest.mark.parametrize(("schedule", "target"), PAIRS)
def test_time_is_never_zero_and_the_loss_is_finite_at_both_ends(schedule, target, time, weight):
    class Ends(Draws):
        """The least and the greatest numbers there are."""

        def uniform(self, purpose, shape=()):
            return torch.tensor([0.0, 1 - 2**-24])

        def normal(self, purpose, shape=()):
            return torch.stack([torch.full(shape, -6.0), torch.full(shape, 6.0)])

    draws = Ends(0, range(2))
    t = time(draws, SCHEDULES[schedule])
    assert (t > 0).all()
    assert (t <= 1).all()
    denoiser = small(SCHEDULES[schedule], TARGETS[target])
    assert (
        Objective(time=time, weight=weight)(denoiser, PICTURES[:2], LABEL[:2], draws)
        .isfinite()
        .all()
    )


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_label_drop_share(share):
    denoiser = small()
    x0, label = torch.zeros(3000, 3, 1, 1), torch.arange(3000) % 4
    Objective(label_drop=share)(denoiser, x0, label, Draws(0, range(3000)))
    (seen,) = denoiser.backbone.labels
    dropped = seen == 4
    assert dropped.float().mean().item() == pytest.approx(share, abs=0.02 if share == 0.1 else 0)
    assert torch.equal(seen[~dropped], label[~dropped])


def test_which_label_drops_depends_on_the_position_alone():
    def dropped(positions, label):
        denoiser = small()
        images = torch.zeros(len(positions), 3, 4, 4)
        Objective(label_drop=0.5)(
            denoiser, images, torch.full((len(positions),), label), Draws(3, positions)
        )
        return dict(zip(positions, (denoiser.backbone.labels[0] == 4).tolist(), strict=True))

    whole = dropped(range(40), 0)
    assert {False, True} == set(whole.values())
    assert whole == dropped(range(20), 1) | dropped(range(20, 40), 2)
    assert whole == dropped([*reversed(range(40))], 3)


def test_a_sample_does_not_see_its_batch():
    objective, denoiser = Objective(label_drop=0.5), small()

    def losses(positions):
        return objective(denoiser, PICTURES[positions], LABEL[positions], Draws(0, positions))

    whole = losses([*range(8)])
    halves = torch.cat([losses([0, 1, 2, 3]), losses([4, 5, 6, 7])])
    assert torch.allclose(whole, halves, rtol=1e-5)
    assert torch.allclose(whole.flip(0), losses([*reversed(range(8))]), rtol=1e-5)
    assert not torch.allclose(
        whole, objective(denoiser, PICTURES, LABEL, Draws(0, range(8, 16))), rtol=1e-2
    )


def test_global_random_state_is_neither_read_nor_moved():
    denoiser = small()
    state = torch.get_rng_state()
    first = Objective()(denoiser, PICTURES, LABEL, Draws(0, range(8)))
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(99)
    assert torch.equal(first, Objective()(denoiser, PICTURES, LABEL, Draws(0, range(8))))


def test_loss_is_float32_under_autocast_and_trains():
    denoiser = small()
    plain = Objective()(denoiser, PICTURES, LABEL, Draws(0, range(8)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = Objective()(denoiser, PICTURES, LABEL, Draws(0, range(8)))
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, plain, rtol=0.02)
    loss.mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in denoiser.parameters())


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_label_drop_must_be_a_share(share):
    with pytest.raises(ValueError, match=rf"label_drop={share} is no share"):
        Objective(label_drop=share)


def test_draws_for_another_batch_are_refused():
    """One draw would otherwise broadcast over the batch unnoticed."""
    with pytest.raises(ValueError, match="draws for 1 positions do not fit 8 images"):
        Objective()(small(), PICTURES, LABEL, Draws(0, [0]))


def test_discrete_times_are_the_steps_of_a_chain_each_as_often():
    draws = Draws(0, range(4000))
    t = Discrete(steps=8)(draws, Cosine())
    counts = (t * 8).unique(return_counts=True)
    assert counts[0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert all(abs(n - 500) < 4 * math.sqrt(500 * 7 / 8) for n in counts[1].tolist())
    assert torch.equal(Discrete(steps=8)(Draws(0, [7]), Cosine()), t[7:8]), "by position"
    t = Discrete()(draws, Cosine())
    assert t.dtype == torch.float32
    assert torch.equal(t, ((t * 1000).round() / 1000))
    with pytest.raises(ValueError, match="steps=0 must"):
        Discrete(steps=0)
