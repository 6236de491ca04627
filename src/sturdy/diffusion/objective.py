"""The loss: draw a time, add noise to x_0, compare the prediction with its target.

loss = w(t) mean_{c,h,w} (f(x_t, t) - y)^2,    x_t = alpha x_0 + sigma eps,    y = target(x_0, eps)
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor
from typing_extensions import override

from exact_resume.randomness import Draws
from sturdy.diffusion.condition import Condition
from sturdy.diffusion.denoiser import Denoiser
from sturdy.diffusion.schedule import STEPS, Schedule
from sturdy.diffusion.target import Target

T_MIN = 2.0**-24  # training times are never 0, where SNR is infinite; float32 uniforms end here too


class Time(ABC):
    """The distribution of training times."""

    @abstractmethod
    def __call__(self, draws: Draws, schedule: Schedule) -> Tensor:
        """Return t ``(b,)``, float32 in [T_MIN, 1] on the CPU, drawn for the purpose "time"."""


class Uniform(Time):
    """t = 1 - u with u in [0, 1), hence in (0, 1]."""

    @override
    def __call__(self, draws: Draws, schedule: Schedule) -> Tensor:
        return 1 - draws.uniform("time")


class Discrete(Time):
    """t = (i + 1) / steps with i uniform on 0 ... steps - 1.

    These are the times of a chain of ``steps`` betas, such as ``ScaledLinear``. A network that was
    trained on them alone has seen no time between.

    Raises:
        ValueError: ``steps`` is less than 1.
    """

    def __init__(self, *, steps: int = STEPS) -> None:
        if steps < 1:
            raise ValueError(f"steps={steps} must be at least 1")
        self.steps = steps

    @override
    def __call__(self, draws: Draws, schedule: Schedule) -> Tensor:
        step = (draws.uniform("time").double() * self.steps).floor()  # exact: u has 24 bits
        return ((step + 1) / self.steps).float()


class LogitNormal(Time):
    """logit t ~ N(mean, std^2): more often in the middle (Esser et al. 2024, eq. 19)."""

    def __init__(self, *, mean: float = 0.0, std: float = 1.0) -> None:
        self.mean = mean
        self.std = std

    @override
    def __call__(self, draws: Draws, schedule: Schedule) -> Tensor:
        return torch.sigmoid(self.mean + self.std * draws.normal("time")).clamp(min=T_MIN)


class LogNormal(Time):
    """log(sigma / alpha) ~ N(mean, std^2) under every schedule.

    Where alpha = 1 that is EDM's (Karras et al. 2022, tab. 1). On rectified flow, where sigma /
    alpha = t / (1 - t), it is ``LogitNormal``.
    """

    def __init__(self, *, mean: float = -1.2, std: float = 1.2) -> None:
        self.mean = mean
        self.std = std

    @override
    def __call__(self, draws: Draws, schedule: Schedule) -> Tensor:
        ratio = (self.mean + self.std * draws.normal("time")).exp()
        return schedule.time(ratio).clamp(T_MIN, 1)


class Weight(ABC):
    """The weight of the squared error of the target, by time."""

    @abstractmethod
    def __call__(self, target: Target, schedule: Schedule, t: Tensor) -> Tensor:
        """Return the weight ``(b,)`` for ``t`` ``(b,)`` on the CPU."""


class Constant(Weight):
    """The weight 1.

    With target=noise that is DDPM's L_simple (Ho et al. 2020, eq. 14), with target=preconditioned
    EDM's weight.
    """

    @override
    def __call__(self, target: Target, schedule: Schedule, t: Tensor) -> Tensor:
        return torch.ones_like(t)


class MinSNR(Weight):
    """min(SNR, gamma) on the error of x_0 (Hang et al. 2023), SNR = (alpha / sigma)^2.

    On the error of the target, that is min(s, gamma) / s for noise and min(s, gamma) / (s + 1) for
    v of a variance-preserving schedule, where s = SNR.
    """

    def __init__(self, *, gamma: float = 5.0) -> None:
        self.gamma = gamma

    @override
    def __call__(self, target: Target, schedule: Schedule, t: Tensor) -> Tensor:
        alpha, sigma = schedule(t)
        snr = (alpha / sigma).square()
        return snr.clamp(max=self.gamma) * target.x0_factor(alpha, sigma)


class Sigmoid(Weight):
    """sigmoid(bias - l) (-dl/dt) / 2 on the error of the noise, l = log SNR.

    Source: Kingma & Gao 2023; Hoogeboom et al. 2024. With time=uniform, -dl/dt makes the loss an
    integral over l, the same under every schedule: that of the ELBO without the details that
    hardly any noise hides. A smaller bias leaves out more of them.
    """

    def __init__(self, *, bias: float = 0.0) -> None:
        self.bias = bias

    @override
    def __call__(self, target: Target, schedule: Schedule, t: Tensor) -> Tensor:
        alpha, sigma = schedule(t.double())
        alpha_slope, sigma_slope = schedule.slope(t)
        # On the error of x_0, which is the noise's over SNR; multiplied out, so that it is finite
        # where alpha is 0.
        scaled_snr = (alpha / sigma).square() * math.exp(-self.bias)
        weight = (alpha * sigma_slope - alpha_slope * sigma) * alpha / sigma**3 / (1 + scaled_snr)
        return (weight * target.x0_factor(alpha, sigma)).to(t.dtype)


class Objective:
    """``objective(denoiser, x0, cond, draws) -> loss (b,)``.

    Args:
        time: distribution of training times; uniform by default.
        weight: of the squared error, by time; 1 by default.
        label_drop: share of samples that get the null condition, for classifier-free guidance.

    Raises:
        ValueError: ``label_drop`` is not between 0 and 1.
    """

    def __init__(
        self, *, time: Time | None = None, weight: Weight | None = None, label_drop: float = 0.1
    ) -> None:
        if not 0 <= label_drop <= 1:
            raise ValueError(f"label_drop={label_drop} is no share; set it between 0 and 1")
        self.time = time or Uniform()
        self.weight = weight or Constant()
        self.label_drop = label_drop

    def __call__(
        self,
        denoiser: Denoiser,
        x0: Tensor,
        cond: Condition | Tensor | None,
        draws: Draws,
    ) -> Tensor:
        """Return one loss a sample, ``(b,)``, in float32 also under autocast.

        Args:
            denoiser: the network that is trained, or its average.
            x0: ``(b, c, h, w)``.
            cond: a condition of the ``b`` samples; or labels ``(b,)``; or None, the null condition.
            draws: of the ``b`` samples; the purposes are "noise", "time" and "label drop".

        Raises:
            ValueError: ``draws`` or ``cond`` is for another number of samples.
        """
        if len(draws) != len(x0):
            raise ValueError(
                f"draws for {len(draws)} positions do not fit {len(x0)} images; give one position "
                f"an image"
            )
        x0 = x0.float()
        noise = draws.normal("noise", x0.shape[1:]).to(x0.device)
        t = self.time(draws, denoiser.schedule)
        weight = self.weight(denoiser.target, denoiser.schedule, t).to(x0.device)
        t = t.to(x0.device)
        cond = denoiser.condition(x0, cond).drop(draws.uniform("label drop") < self.label_drop)

        alpha, sigma = (coefficient[:, None, None, None] for coefficient in denoiser.schedule(t))
        x_t = alpha * x0 + sigma * noise
        error = denoiser.predict(x_t, t, cond) - denoiser.target(x0, noise, alpha, sigma)
        return weight * error.square().flatten(1).mean(1)
