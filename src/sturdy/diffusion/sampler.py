"""Samplers: from noise to x_0 along times start = t_0 > t_1 > ... > t_n = 0.

With D = E[x_0 | x_t] from the denoiser, and E = (x_t - alpha D) / sigma, the noise that it implies,
the probability-flow ODE of every schedule is

    dx = D dalpha + E dsigma

Nothing is divided by alpha(t), so sampling may start where it is 0. Sigma is 0 only at the end.
"""

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from typing_extensions import override

from exact_resume.randomness import Draws
from sturdy.diffusion.condition import Condition
from sturdy.diffusion.schedule import Schedule
from sturdy.diffusion.spacing import SPACINGS

Range = tuple[float, float]
PIXEL_RANGE: Range = (-1.0, 1.0)


class Step(NamedTuple):
    """One step of a sampler.

    Attributes:
        t: the time that was reached.
        x: the state there, ``(b, c, h, w)``.
        x0: the estimate of x_0 that led there, ``(b, c, h, w)``.
    """

    t: float
    x: Tensor
    x0: Tensor


class TimePoint(NamedTuple):
    """A time and its coefficients."""

    t: float
    alpha: float
    sigma: float


class Estimator(Protocol):
    """What a sampler needs of a denoiser: plain, guided or in closed form."""

    schedule: Schedule

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition | Tensor | None, /) -> Tensor:
        """Return the estimate of x_0, ``(b, c, h, w)``."""
        ...


class DenoiserCall:
    """``estimate(x, point) -> D, E``, each ``(b, c, h, w)``: a denoiser under one condition.

    Args:
        denoiser: is called without gradients.
        cond: a condition, labels or None.
        clip: the range to which D is clipped; None does not clip.
    """

    def __init__(
        self, denoiser: Estimator, cond: Condition | Tensor | None, clip: Range | None
    ) -> None:
        self.denoiser = denoiser
        self.cond = cond
        self.clip = clip

    @torch.no_grad()
    def __call__(self, x: Tensor, at: TimePoint) -> tuple[Tensor, Tensor]:
        """Return D and E of the state ``x`` at a time."""
        t = torch.full((len(x),), at.t, dtype=x.dtype, device=x.device)
        x0 = self.denoiser(x, t, self.cond)
        if self.clip is not None:
            x0 = x0.clamp(*self.clip)
        return x0, (x - at.alpha * x0) / at.sigma

    def time_points(self, times: list[float]) -> list[TimePoint]:
        """Return the times with their coefficients."""
        t = torch.tensor(times, dtype=torch.float64, device="cpu")
        alphas, sigmas = self.denoiser.schedule(t)
        coefficients = zip(times, alphas.tolist(), sigmas.tolist(), strict=True)
        return [TimePoint(*each) for each in coefficients]


class Sampler(ABC):
    """``sampler(denoiser, noise, cond, draws)`` yields the steps; the last, at t = 0, is x_0.

    Args:
        steps: number of steps.
        spacing: of the steps: "time", "karras" or "log_snr"; see ``spacing.py``.
        power: of the times t_i = (1 - i / steps)^power of spacing=time. 1 is even; 2 is denser near
            data, the "quadratic" of Song, Meng et al. 2021, app. D.2.
        start: scales all times. Below 1 the noisiest times, at which a network was hardly trained,
            are skipped, and the remaining signal alpha(start) x_0 is ignored.

    Attributes:
        random: whether steps add noise.

    Raises:
        ValueError: ``steps`` below 1, ``power`` not above 0, an unknown ``spacing``, or ``start``
            outside (0, 1].
    """

    random = False

    def __init__(
        self,
        steps: int = 50,
        *,
        spacing: str = "time",
        power: float = 1.0,
        start: float = 1.0,
    ) -> None:
        if steps < 1:
            raise ValueError(f"steps={steps} must be 1 or more")
        if power <= 0:
            raise ValueError(f"power={power} must be above 0")
        if spacing not in SPACINGS:
            raise ValueError(f"spacing={spacing} is none of {', '.join(SPACINGS)}")
        if not 0 < start <= 1:
            raise ValueError(
                f"start={start} must be a time above 0 and at most 1, which is noise alone"
            )
        self.steps = steps
        self.spacing = spacing
        self.power = power
        self.start = start

    def __call__(
        self,
        denoiser: Estimator,
        noise: Tensor,
        cond: Condition | Tensor | None = None,
        draws: Draws | None = None,
        *,
        clip: Range | None = PIXEL_RANGE,
    ) -> Iterator[Step]:
        """Yield the steps from x = sigma(start) noise on.

        The signal alpha(start) x_0 is not known yet; for schedule=linear it is 0.6 % of x_0.

        Args:
            denoiser: plain or guided.
            noise: ``(b, c, h, w)``, standard normal, float32.
            cond: a condition of ``b`` samples; or labels ``(b,)``; or None, the null condition.
            draws: of the ``b`` samples, for samplers that add noise: at step ``i`` of purpose "step
                i".
            clip: the range to which every D is clipped, as in DDPM; ``space.clip`` of the run's
                space, by default that of pixels. E is derived from the clipped D, so that x_t =
                alpha D + sigma E stays true. Near t = 1 this keeps target=noise stable.

        Raises:
            ValueError: the sampler adds noise, and ``draws`` is missing or for another number of
                samples.
        """
        if self.random and (draws is None or len(draws) != len(noise)):
            given = "none" if draws is None else f"some for {len(draws)}"
            raise ValueError(
                f"{type(self).__name__} adds noise and needs draws for {len(noise)} samples, got "
                f"{given}; pass draws=Draws(seed, positions)"
            )
        estimate = DenoiserCall(denoiser, cond, clip)
        times = SPACINGS[self.spacing](denoiser.schedule, self.steps, self.power)
        points = estimate.time_points([self.start * t for t in times])
        return self.integrate(estimate, points[0].sigma * noise.detach(), points, draws)

    @abstractmethod
    def integrate(
        self, estimate: DenoiserCall, x: Tensor, points: list[TimePoint], draws: Draws | None
    ) -> Iterator[Step]:
        """Yield one step for every pair of neighbouring times (t, s).

        Args:
            estimate: ``estimate(x, t) -> D, E``.
            x: the state at the first time, ``(b, c, h, w)``.
            points: the times, falling.
            draws: for fresh noise; None for a sampler that adds none.
        """


class DDPM(Sampler):
    """Ancestral sampling (Ho et al. 2020, eq. 7), any alpha and sigma (Kingma et al. 2021, app. A).

    x_s ~ q(x_s | x_t, x_0 = D) = N((a sigma_s^2 x_t + b^2 alpha_s D) / sigma_t^2, (b sigma_s /
    sigma_t)^2)
    """

    random = True

    def __init__(
        self,
        steps: int = 1000,
        *,
        spacing: str = "time",
        power: float = 1.0,
        start: float = 1.0,
    ) -> None:
        super().__init__(steps, spacing=spacing, power=power, start=start)

    @override
    def integrate(
        self, estimate: DenoiserCall, x: Tensor, points: list[TimePoint], draws: Draws | None
    ) -> Iterator[Step]:
        for i, (t, s) in enumerate(pairwise(points)):
            x0, _ = estimate(x, t)
            a, b = transition(t, s)
            x = (a * s.sigma**2 * x + b**2 * s.alpha * x0) / t.sigma**2
            x = add_noise(x, b * s.sigma / t.sigma, draws, i)
            yield Step(s.t, x, x0)


class DDIM(Sampler):
    """x_s = alpha_s D + sqrt(sigma_s^2 - std^2) E + std z (Song, Meng et al. 2021, eq. 12).

    Args:
        steps: as of ``Sampler``, like the others.
        eta: std as a share of DDPM's (eq. 16): 0 is deterministic, 1 is DDPM.

    Raises:
        ValueError: ``eta`` outside [0, 1].
    """

    def __init__(
        self,
        steps: int = 50,
        *,
        eta: float = 0.0,
        spacing: str = "time",
        power: float = 1.0,
        start: float = 1.0,
    ) -> None:
        super().__init__(steps, spacing=spacing, power=power, start=start)
        if not 0 <= eta <= 1:
            raise ValueError(f"eta={eta} must be from 0 (deterministic) to 1 (DDPM)")
        self.eta = eta
        self.random = eta > 0

    @override
    def integrate(
        self, estimate: DenoiserCall, x: Tensor, points: list[TimePoint], draws: Draws | None
    ) -> Iterator[Step]:
        for i, (t, s) in enumerate(pairwise(points)):
            x0, noise = estimate(x, t)
            _, b = transition(t, s)
            std = self.eta * b * s.sigma / t.sigma
            x = s.alpha * x0 + math.sqrt(max(s.sigma**2 - std**2, 0.0)) * noise
            x = add_noise(x, std, draws, i)
            yield Step(s.t, x, x0)


class Euler(Sampler):
    """Order 1: dx = D dalpha + E dsigma with D and E constant over a step.

    That is Euler in t on rectified flow, Euler in sigma where alpha = 1, and DDIM with eta = 0
    everywhere.
    """

    @override
    def integrate(
        self, estimate: DenoiserCall, x: Tensor, points: list[TimePoint], draws: Draws | None
    ) -> Iterator[Step]:
        for t, s in pairwise(points):
            x0, noise = estimate(x, t)
            x = euler_step(x, x0, noise, t, s)
            yield Step(s.t, x, x0)


class Heun(Sampler):
    """Order 2: dx = D dalpha + E dsigma by the trapezoidal rule, after an Euler step.

    It takes 2 steps - 1 calls. It is Heun in t on rectified flow, and in sigma where alpha = 1
    (Karras et al. 2022, alg. 1). As there, the last step is Euler's: at sigma = 0, E is not
    defined. ``power`` is 2 because a variance-preserving sigma grows like sqrt(t), and even times
    would have about order 1.5.
    """

    def __init__(
        self,
        steps: int = 25,
        *,
        spacing: str = "time",
        power: float = 2.0,
        start: float = 1.0,
    ) -> None:
        super().__init__(steps, spacing=spacing, power=power, start=start)

    @override
    def integrate(
        self, estimate: DenoiserCall, x: Tensor, points: list[TimePoint], draws: Draws | None
    ) -> Iterator[Step]:
        for i, (t, s) in enumerate(pairwise(points)):
            x, t = self.add_churn(estimate, x, t, draws, i)
            x0, noise = estimate(x, t)
            if s.sigma > 0:
                x0_next, noise_next = estimate(euler_step(x, x0, noise, t, s), s)
                x0 = (x0 + x0_next) / 2
                noise = (noise + noise_next) / 2
            x = euler_step(x, x0, noise, t, s)
            yield Step(s.t, x, x0)

    def add_churn(
        self, estimate: DenoiserCall, x: Tensor, t: TimePoint, draws: Draws | None, i: int
    ) -> tuple[Tensor, TimePoint]:
        """Return where step ``i`` starts; ``Churn`` goes back a little towards noise first."""
        return x, t


def euler_step(x: Tensor, x0: Tensor, noise: Tensor, t: TimePoint, s: TimePoint) -> Tensor:
    """Return x + D (alpha_s - alpha_t) + E (sigma_s - sigma_t), ``(b, c, h, w)``."""
    return x + (s.alpha - t.alpha) * x0 + (s.sigma - t.sigma) * noise


def transition(t: TimePoint, s: TimePoint) -> tuple[float, float]:
    """Return a and b of one step of the forward process, x_t = a x_s + b eps, where s < t."""
    a = t.alpha / s.alpha
    return a, math.sqrt(max(t.sigma**2 - (a * s.sigma) ** 2, 0.0))


def add_noise(x: Tensor, std: float, draws: Draws | None, i: int) -> Tensor:
    """Return ``x`` with the fresh noise of step ``i``: each sample's own, at any batch size."""
    if std == 0 or draws is None:
        return x
    return x + std * draws.normal(f"step {i}", x.shape[1:]).to(x)


def sample(
    sampler: Sampler,
    denoiser: Estimator,
    noise: Tensor,
    cond: Condition | Tensor | None = None,
    draws: Draws | None = None,
    *,
    clip: Range | None = PIXEL_RANGE,
) -> Tensor:
    """Return the x_0 ``(b, c, h, w)`` of the last step, within ``clip``.

    Arguments and errors are those of ``Sampler.__call__``.
    """
    steps = sampler(denoiser, noise, cond, draws, clip=clip)
    x0 = deque(steps, maxlen=1).pop().x
    return x0 if clip is None else x0.clamp(*clip)
