"""Gaussian data: its ideal denoiser, every ideal prediction and the exact walk back, all in closed form.

Written from x_t ~ N(alpha mu, alpha^2 s^2 + sigma^2) alone, without the conversions that are under test.
"""

import torch
from torch import nn

from sturdy.diffusion import X0, Cosine, Linear, Noise, RectifiedFlow, V, Velocity

MU, S = 0.2, 0.25
SCHEDULES = {"linear": Linear(), "cosine": Cosine(), "rectified_flow": RectifiedFlow()}
TARGETS = {"noise": Noise(), "x0": X0(), "v": V(), "velocity": Velocity()}
REFUSED = {("rectified_flow", "noise"), ("linear", "velocity"), ("cosine", "velocity")}
PAIRS = [(schedule, target) for schedule in SCHEDULES for target in TARGETS if (schedule, target) not in REFUSED]


def posterior_mean(x, alpha, sigma, mu=MU, s=S):
    """E[x_0 | x_t]: in x_t / alpha and sigma / alpha the design's (s^2 x + sigma^2 mu) / (s^2 + sigma^2)."""
    return (alpha * s**2 * x + sigma**2 * mu) / (alpha**2 * s**2 + sigma**2)


def posterior_noise(x, alpha, sigma, mu=MU, s=S):
    """E[eps | x_t]."""
    return sigma * (x - alpha * mu) / (alpha**2 * s**2 + sigma**2)


IDEAL = {
    "noise": posterior_noise,
    "x0": posterior_mean,
    "v": lambda x, a, g: a * posterior_noise(x, a, g) - g * posterior_mean(x, a, g),
    "velocity": lambda x, a, g: posterior_noise(x, a, g) - posterior_mean(x, a, g),
}


class Ideal(nn.Module):
    """The backbone that training on this data would end with, for one schedule and one target."""

    def __init__(self, schedule, target):
        super().__init__()
        self.schedule = SCHEDULES[schedule]
        self.prediction = IDEAL[target]

    def forward(self, x, t, label):
        return self.prediction(x, *(c[:, None, None, None] for c in self.schedule(t)))


def exact_walk(schedule, noise, mu=MU, s=S):
    """Where the probability-flow ODE takes x = sigma(1) noise: the same number of standard deviations."""
    alpha, sigma = (c.item() for c in SCHEDULES[schedule](torch.ones(1, dtype=torch.float64)))
    return mu + s * (sigma * noise - alpha * mu) / (alpha**2 * s**2 + sigma**2) ** 0.5
