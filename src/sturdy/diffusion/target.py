"""What the network predicts: the noise, x_0, or a mixture of both.

    y = target(x_0, eps),    x_0 = target.x0(y, x_t),    where x_t = alpha x_0 + sigma eps

A target is two formulas, there and back, on ``x0``, ``noise``, ``x_t`` and ``prediction`` ``(b, c,
h, w)``; ``alpha`` and ``sigma`` are whatever broadcasts with them, mostly ``(b, 1, 1, 1)``.
"""

import math
import re
from abc import ABC, abstractmethod

import torch
from torch import Tensor
from typing_extensions import override

from sturdy.diffusion.schedule import Schedule


class Target(ABC):
    """The contract: two formulas.

    ``x0_factor`` follows from them. Override ``incompatibility`` if not every schedule will do.
    """

    @abstractmethod
    def __call__(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return the right prediction, ``(b, c, h, w)``."""

    @abstractmethod
    def x0(self, prediction: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return the x_0 of a prediction, ``(b, c, h, w)``.

        It is linear in ``prediction`` and ``x_t``.
        """

    def inputs(self, x_t: Tensor, t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
        """Return the inputs of the network for ``x_t`` ``(b, c, h, w)`` and ``t`` ``(b,)``.

        By default these are ``x_t`` and ``t`` themselves.
        """
        return x_t, t

    def x0_factor(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return c ``(b,)`` in |error of x_0|^2 = c |error of the prediction|^2, at equal x_t."""
        slope = self.x0(torch.ones_like(alpha), torch.zeros_like(alpha), alpha, sigma)
        return slope.square()

    def incompatibility(self, schedule: Schedule) -> str | None:
        """Return why this target makes no sense with ``schedule``, and what to choose instead.

        None if it makes sense.
        """
        size = math.hypot(*coefficients_at(schedule, 1.0))
        if size < 2:
            return None
        return (
            f"x_t grows to {size:.0f} times the size of an image, and the network would get it "
            "unscaled; choose target=preconditioned, or else schedule=rectified_flow or "
            "schedule=cosine"
        )

    def check(self, schedule: Schedule) -> None:
        """Raise ValueError, with the reason, if this target makes no sense with ``schedule``."""
        if reason := self.incompatibility(schedule):
            raise ValueError(
                f"target={config_name(self)} does not suit schedule={config_name(schedule)}: "
                f"{reason}"
            )


class Noise(Target):
    """The noise eps (Ho et al. 2020, eq. 14)."""

    @override
    def __call__(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return noise

    @override
    def x0(self, prediction: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (x_t - sigma * prediction) / alpha

    @override
    def incompatibility(self, schedule: Schedule) -> str | None:
        if coefficients_at(schedule, 1.0)[0] > 0:
            return super().incompatibility(schedule)
        return (
            "its alpha(1) is 0, so x_0 = (x_t - sigma eps) / alpha cannot be recovered at t = 1; "
            "choose target=velocity, target=v or target=x0, or else schedule=cosine or "
            "schedule=linear"
        )


class X0(Target):
    """x_0 itself."""

    @override
    def __call__(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return x0

    @override
    def x0(self, prediction: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return prediction


class V(Target):
    """v = alpha eps - sigma x_0, at right angles to x_t (Salimans & Ho 2022, app. D)."""

    @override
    def __call__(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha * noise - sigma * x0

    @override
    def x0(self, prediction: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (alpha * x_t - sigma * prediction) / (alpha.square() + sigma.square())


class Velocity(Target):
    """u = eps - x_0, the velocity dx_t/dt of rectified flow.

    Source: Liu et al. 2023, eq. 1, from data to noise.
    """

    @override
    def __call__(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return noise - x0

    @override
    def x0(self, prediction: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (x_t - sigma * prediction) / (alpha + sigma)

    @override
    def incompatibility(self, schedule: Schedule) -> str | None:
        if all(abs(sum(coefficients_at(schedule, t)) - 1) < 1e-6 for t in (0.25, 0.5, 0.75)):
            return None
        return (
            "eps - x_0 is the velocity of x_t only where alpha + sigma = 1; "
            "choose schedule=rectified_flow, or else target=v"
        )


class Preconditioned(Target):
    """EDM's F in D = c_skip x_t + c_out F(c_in x_t, c_noise).

    Source: Karras et al. 2022, eq. 7 and tab. 1. With s = sigma_data, and with n^2 = alpha^2 s^2 +
    sigma^2, the variance of x_t: c_skip = alpha s^2 / n^2, c_out = sigma s / n, c_in = 1 / n,
    c_noise = log(sigma / alpha) / 4. At alpha = 1 these are the paper's. Its weight is 1 / c_out^2
    on the error of x_0, that is 1 on the error of F.

    Args:
        sigma_data: standard deviation of x_0; for pixels in [-1, 1] about 0.5.

    Raises:
        ValueError: ``sigma_data`` is not above 0.
    """

    def __init__(self, *, sigma_data: float = 0.5) -> None:
        if sigma_data <= 0:
            raise ValueError(
                f"sigma_data={sigma_data} must be above 0; it is the spread of the pixels"
            )
        self.sigma_data = sigma_data

    @override
    def __call__(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        # (x_0 - c_skip x_t) / c_out, multiplied out: nothing is divided by sigma.
        return (sigma * x0 / self.sigma_data - alpha * self.sigma_data * noise) / self._size(
            alpha, sigma
        )

    @override
    def x0(self, prediction: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        size = self._size(alpha, sigma)
        return (
            alpha * (self.sigma_data / size).square() * x_t
            + sigma * self.sigma_data / size * prediction
        )

    @override
    def inputs(self, x_t: Tensor, t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
        """Return c_in x_t ``(b, c, h, w)`` and, in place of t, c_noise ``(b,)``."""
        alpha, sigma = schedule(t)
        tiny = torch.finfo(sigma.dtype).tiny  # at t = 0 the logarithm stays finite
        c_noise = (sigma / alpha).clamp(min=tiny).log() / 4
        return x_t / self._size(alpha, sigma)[:, None, None, None], c_noise

    @override
    def incompatibility(self, schedule: Schedule) -> str | None:
        if coefficients_at(schedule, 1.0)[0] > 0:
            return None
        return (
            "its alpha(1) is 0, so c_noise = log(sigma / alpha) / 4 is infinite at t = 1; "
            "choose target=velocity, target=v or target=x0, or else schedule=variance_exploding"
        )

    def _size(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (alpha * self.sigma_data).square().add(sigma.square()).sqrt()


def coefficients_at(schedule: Schedule, t: float) -> tuple[float, float]:
    """Return alpha and sigma at one time, in float64.

    On the CPU, even while a model is being built on `meta`.
    """
    alpha, sigma = schedule(torch.tensor([t], dtype=torch.float64, device="cpu"))
    return alpha.item(), sigma.item()


def config_name(choice: object) -> str:
    """Return the name by which the config chooses a class: RectifiedFlow is rectified_flow."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(choice).__name__).lower()
