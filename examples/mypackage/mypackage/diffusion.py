"""A schedule, a target, and a weight of the objective."""

import math

from torch import Tensor
from typing_extensions import override

from sturdy.diffusion.objective import Weight
from sturdy.diffusion.schedule import Schedule
from sturdy.diffusion.target import Target


class Trigonometric(Schedule):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2)."""

    @override
    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        angle = math.pi / 2 * t
        return angle.cos(), angle.sin()


class Residual(Target):
    """y = x_0 - x_t, the difference to add to x_t."""

    @override
    def __call__(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return x0 - (alpha * x0 + sigma * noise)

    @override
    def x0(self, prediction: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return x_t + prediction


class P2(Weight):
    """1 / (1 + SNR)^gamma on the error of the noise (Choi et al. 2022), SNR = (alpha / sigma)^2.

    Args:
        gamma: 0 is the error of the noise itself; more gives small noise less weight.
    """

    def __init__(self, *, gamma: float = 1.0) -> None:
        self.gamma = gamma

    @override
    def __call__(self, target: Target, schedule: Schedule, t: Tensor) -> Tensor:
        alpha, sigma = schedule(t)
        snr = (alpha / sigma).square()  # the error of the noise is that of x_0 times SNR
        return snr * target.x0_factor(alpha, sigma) / (1 + snr) ** self.gamma
