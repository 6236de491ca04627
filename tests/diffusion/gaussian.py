"""Gaussian data and a mixture of two: ideal denoisers, ideal predictions and exact walks back, all
in closed form.

Written from x_t ~ N(alpha mu, alpha^2 s^2 + sigma^2) alone, without the conversions that are under
test.
"""

import torch
from torch import nn

from sturdy.diffusion import (
    X0,
    Cosine,
    Linear,
    Noise,
    Preconditioned,
    RectifiedFlow,
    ScaledLinear,
    Shifted,
    V,
    VarianceExploding,
    Velocity,
)

MU, S = 0.2, 0.25
SIGMA_DATA = 0.4  # not the data's, so that a target that ignores it is found out
SCHEDULES = {
    "linear": Linear(),
    "scaled_linear": ScaledLinear(),
    "cosine": Cosine(),
    "rectified_flow": RectifiedFlow(),
    "shifted": Shifted(RectifiedFlow(), image_size=64),
    "shifted_cosine": Shifted(Cosine(), image_size=64),
    "variance_exploding": VarianceExploding(),
}
TARGETS = {
    "noise": Noise(),
    "x0": X0(),
    "v": V(),
    "velocity": Velocity(),
    "preconditioned": Preconditioned(sigma_data=SIGMA_DATA),
}
STRAIGHT = {"rectified_flow", "shifted"}  # alpha + sigma = 1
REFUSED = (
    {(schedule, target) for schedule in STRAIGHT for target in ("noise", "preconditioned")}
    | {(schedule, "velocity") for schedule in SCHEDULES if schedule not in STRAIGHT}
    | {("variance_exploding", target) for target in ("noise", "x0", "v")}
)
PAIRS = [
    (schedule, target)
    for schedule in SCHEDULES
    for target in TARGETS
    if (schedule, target) not in REFUSED
]


def derivatives(schedule, t):
    """dalpha/dt and dsigma/dt by automatic differentiation."""
    t = t.clone().requires_grad_()
    coefficients = (c + 0 * t for c in schedule(t))  # alpha may not depend on t
    return [torch.autograd.grad(c.sum(), t, retain_graph=True)[0] for c in coefficients]


def posterior_mean(x, alpha, sigma, mu=MU, s=S):
    """E[x_0 | x_t]: in x_t / alpha and sigma / alpha the design's (s^2 x + sigma^2 mu) / (s^2 +
    sigma^2).
    """
    return (alpha * s**2 * x + sigma**2 * mu) / (alpha**2 * s**2 + sigma**2)


def posterior_noise(x, alpha, sigma, mu=MU, s=S):
    """E[eps | x_t]."""
    return sigma * (x - alpha * mu) / (alpha**2 * s**2 + sigma**2)


def posterior_f(x, alpha, sigma):
    """EDM's F, as the paper has it: of x = x_t / alpha at the noise level sigma / alpha, with
    c_skip and c_out.
    """
    x, sigma = x / alpha, sigma / alpha
    c_skip = SIGMA_DATA**2 / (sigma**2 + SIGMA_DATA**2)
    c_out = sigma * SIGMA_DATA / (sigma**2 + SIGMA_DATA**2) ** 0.5
    return (posterior_mean(x, 1, sigma) - c_skip * x) / c_out


IDEAL = {
    "noise": posterior_noise,
    "x0": posterior_mean,
    "v": lambda x, a, g: a * posterior_noise(x, a, g) - g * posterior_mean(x, a, g),
    "velocity": lambda x, a, g: posterior_noise(x, a, g) - posterior_mean(x, a, g),
    "preconditioned": posterior_f,
}


class Ideal(nn.Module):
    """The backbone that training on this data would end with, for one schedule and one target."""

    def __init__(self, schedule, target):
        super().__init__()
        self.schedule = SCHEDULES[schedule]
        self.target = target

    def forward(self, x, t, label):
        if self.target == "preconditioned":  # it is handed c_in x_t and c_noise instead
            t = self.schedule.time((4 * t).exp())
            alpha, sigma = (c[:, None, None, None] for c in self.schedule(t))
            x = x * (sigma**2 + alpha**2 * SIGMA_DATA**2) ** 0.5
        return IDEAL[self.target](x, *(c[:, None, None, None] for c in self.schedule(t)))


class Exact:
    """E[x_0 | x_t] of the Gaussian, for a sampler alone: no network, no target."""

    def __init__(self, schedule, mu=MU, s=S):
        self.schedule, self.mu, self.s = schedule, mu, s

    def __call__(self, x, t, label=None):
        return posterior_mean(
            x, *(c[:, None, None, None] for c in self.schedule(t)), self.mu, self.s
        )


def exact_walk(schedule, noise, mu=MU, s=S, start=1.0):
    """Where the probability-flow ODE takes x = sigma(start) noise: the same number of standard
    deviations.
    """
    alpha, sigma = (c.item() for c in schedule(torch.tensor([start], dtype=torch.float64)))
    return mu + s * (sigma * noise - alpha * mu) / (alpha**2 * s**2 + sigma**2) ** 0.5


class TwoPeaks:
    """E[x_0 | x_t] for 0.3 N(-0.6, 0.1^2) + 0.7 N(0.5, 0.2^2)."""

    WEIGHT, CENTRE, WIDTH = torch.tensor([[0.3, 0.7], [-0.6, 0.5], [0.1, 0.2]], dtype=torch.float64)
    MEAN = (WEIGHT * CENTRE).sum().item()
    STD = ((WEIGHT * (CENTRE**2 + WIDTH**2)).sum().item() - MEAN**2) ** 0.5

    def __init__(self, schedule):
        self.schedule = schedule

    def __call__(self, x, t, label=None):
        alpha, sigma = (c[:, None, None, None, None] for c in self.schedule(t))
        variance = (alpha * self.WIDTH) ** 2 + sigma**2
        away = x[..., None] - alpha * self.CENTRE
        peak = (self.WEIGHT.log() - variance.log() / 2 - away**2 / variance / 2).softmax(-1)
        return (peak * (self.CENTRE + alpha * self.WIDTH**2 * away / variance)).sum(-1)

    def cdf(self, x, alpha=1.0, sigma=0.0):
        """Of x_t."""
        spread = ((alpha * self.WIDTH) ** 2 + sigma**2) ** 0.5
        return (
            self.WEIGHT * torch.special.ndtr((x[..., None] - alpha * self.CENTRE) / spread)
        ).sum(-1)

    def off(self, x, noise):
        """How far, in quantiles, each pixel is from where the exact walk takes its noise.

        In one dimension that walk is monotone: a pixel ends on the quantile on which it began.
        """
        alpha, sigma = (c.item() for c in self.schedule(torch.ones(1, dtype=torch.float64)))
        return (self.cdf(x) - self.cdf(sigma * noise, alpha, sigma)).abs()
