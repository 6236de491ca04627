"""The walk back from noise, along times start = t_0 > t_1 > ... > t_n = 0.

With D = E[x_0 | x_t] from the denoiser, and E = (x_t - alpha D) / sigma, the noise that it implies,
the probability-flow ODE of every schedule is

    dx = D dalpha + E dsigma

Nothing is divided by alpha(t), so a walk may start where it is 0; sigma is 0 only where the walk
ends.
"""

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from exact_resume.randomness import Draws
from sturdy.diffusion.schedule import Schedule
from sturdy.diffusion.spacing import SPACINGS

Range = tuple[float, float]


class Step(NamedTuple):
    """One step of a walk: the time reached, the state there, and the estimate of x_0 that led
    there.
    """

    t: float
    x: Tensor  # (b, c, h, w)
    x0: Tensor  # (b, c, h, w)


class TimePoint(NamedTuple):
    """One time of a walk and its coefficients."""

    t: float
    alpha: float
    sigma: float


class Estimator(Protocol):
    """What a sampler needs of a denoiser, be it plain, guided or known in closed form."""

    schedule: Schedule

    def __call__(self, x_t: Tensor, t: Tensor, label: Tensor | None, /) -> Tensor: ...


class DenoiserCall:
    """``estimate(x, knot) -> D, E``, each ``(b, c, h, w)``: what a denoiser says in one walk."""

    def __init__(self, denoiser: Estimator, label: Tensor | None, clip: Range | None) -> None:
        self.denoiser = denoiser
        self.label = label
        self.clip = clip

    @torch.no_grad()
    def __call__(self, x: Tensor, at: TimePoint) -> tuple[Tensor, Tensor]:
        t = torch.full((len(x),), at.t, dtype=x.dtype, device=x.device)
        x0 = self.denoiser(x, t, self.label)
        if self.clip is not None:
            x0 = x0.clamp(*self.clip)
        return x0, (x - at.alpha * x0) / at.sigma

    def knots(self, times: list[float]) -> list[TimePoint]:
        alphas, sigmas = self.denoiser.schedule(
            torch.tensor(times, dtype=torch.float64, device="cpu")
        )
        return [
            TimePoint(*knot) for knot in zip(times, alphas.tolist(), sigmas.tolist(), strict=True)
        ]


class Sampler(ABC):
    """``sampler(denoiser, noise, label, draws)`` yields the steps; the last, at t = 0, is the
    picture.

    Args:
        steps: number of steps.
        spacing: of the steps: "time", "karras" or "log_snr"; see ``spacing.py``.
        power: of the times t_i = (1 - i / steps)^power of spacing=time. 1 is even; 2 is denser near
            data, the "quadratic" of Song, Meng et al. 2021, app. D.2.
        start: the time of the first stop, of which all others are that much earlier, too. Below 1 a
            walk avoids the times at which a network was hardly trained, and takes alpha(start) x_0
            for nothing.

    Raises:
        ValueError: ``steps`` below 1, ``power`` not above 0, an unknown ``spacing``, or ``start``
            outside (0, 1].
    """

    random = False  # whether steps add noise

    def __init__(
        self,
        steps: int = 50,
        *,
        spacing: str = "time",
        power: float = 1.0,
        start: float = 1.0,
    ) -> None:
        if steps < 1 or power <= 0:
            raise ValueError(
                f"sampler.steps={steps} must be 1 or more, and sampler.power={power} above 0"
            )
        if spacing not in SPACINGS:
            raise ValueError(f"sampler.spacing={spacing} is none of {', '.join(SPACINGS)}")
        if not 0 < start <= 1:
            raise ValueError(
                f"sampler.start={start} must be a time above 0 and at most 1, which is noise alone"
            )
        self.steps = steps
        self.spacing, self.power, self.start = spacing, power, start

    def __call__(
        self,
        denoiser: Estimator,
        noise: Tensor,
        label: Tensor | None = None,
        draws: Draws | None = None,
        *,
        clip: Range | None = (-1.0, 1.0),
    ) -> Iterator[Step]:
        """Walk from x = sigma(start) noise: alpha(start) x_0 (for linear 0.6 % of x_0 at 1) is not
        known yet.

        Args:
            noise: ``(b, c, h, w)``, standard normal, float32.
            label: ``(b,)`` int64, or None for no condition.
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
                f"{given}; "
                "hand in draws=Draws(seed, positions)"
            )
        estimate = DenoiserCall(denoiser, label, clip)
        times = SPACINGS[self.spacing](denoiser.schedule, self.steps, self.power)
        knots = estimate.knots([self.start * t for t in times])
        return self.walk(estimate, knots[0].sigma * noise.detach(), knots, draws)

    @abstractmethod
    def walk(
        self, estimate: DenoiserCall, x: Tensor, knots: list[TimePoint], draws: Draws | None
    ) -> Iterator[Step]:
        """One step for every pair of neighbouring knots (t, s), from ``x`` at the first knot."""


class DDPM(Sampler):
    """Ancestral sampling (Ho et al. 2020, eq. 7), any alpha and sigma (Kingma et al. 2021, app. A):

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

    def walk(
        self, estimate: DenoiserCall, x: Tensor, knots: list[TimePoint], draws: Draws | None
    ) -> Iterator[Step]:
        for i, (t, s) in enumerate(pairwise(knots)):
            x0, _ = estimate(x, t)
            a, b = transition(t, s)
            x = (a * s.sigma**2 * x + b**2 * s.alpha * x0) / t.sigma**2
            x = add_noise(x, b * s.sigma / t.sigma, draws, i)
            yield Step(s.t, x, x0)


class DDIM(Sampler):
    """x_s = alpha_s D + sqrt(sigma_s^2 - std^2) E + std z (Song, Meng et al. 2021, eq. 12).

    Args:
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
            raise ValueError(f"sampler.eta={eta} must be from 0 (deterministic) to 1 (DDPM)")
        self.eta = eta
        self.random = eta > 0

    def walk(
        self, estimate: DenoiserCall, x: Tensor, knots: list[TimePoint], draws: Draws | None
    ) -> Iterator[Step]:
        for i, (t, s) in enumerate(pairwise(knots)):
            x0, noise = estimate(x, t)
            _, b = transition(t, s)
            std = self.eta * b * s.sigma / t.sigma
            x = s.alpha * x0 + math.sqrt(max(s.sigma**2 - std**2, 0.0)) * noise
            x = add_noise(x, std, draws, i)
            yield Step(s.t, x, x0)


class Euler(Sampler):
    """Order 1: dx = D dalpha + E dsigma with D and E held over a step.

    That is Euler in t on rectified flow, Euler in sigma where alpha = 1, and DDIM with eta = 0
    everywhere.
    """

    def walk(
        self, estimate: DenoiserCall, x: Tensor, knots: list[TimePoint], draws: Draws | None
    ) -> Iterator[Step]:
        for t, s in pairwise(knots):
            x0, noise = estimate(x, t)
            x = x + (s.alpha - t.alpha) * x0 + (s.sigma - t.sigma) * noise
            yield Step(s.t, x, x0)


class Heun(Sampler):
    """Order 2: dx = D dalpha + E dsigma by the trapezoidal rule, after an Euler step; 2 steps - 1
    calls.

    That is Heun in t on rectified flow, and in sigma where alpha = 1 (Karras et al. 2022, alg. 1).
    As there, the last step is Euler's: at sigma = 0, E is not defined. ``power`` is 2 because a
    variance-preserving sigma grows like sqrt(t), and even times would leave about order 1.5.
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

    def walk(
        self, estimate: DenoiserCall, x: Tensor, knots: list[TimePoint], draws: Draws | None
    ) -> Iterator[Step]:
        for i, (t, s) in enumerate(pairwise(knots)):
            x, t = self.churned(estimate, x, t, draws, i)
            x0, noise = estimate(x, t)
            if s.sigma > 0:
                ahead = x + (s.alpha - t.alpha) * x0 + (s.sigma - t.sigma) * noise
                x0_ahead, noise_ahead = estimate(ahead, s)
                x0, noise = (x0 + x0_ahead) / 2, (noise + noise_ahead) / 2
            x = x + (s.alpha - t.alpha) * x0 + (s.sigma - t.sigma) * noise
            yield Step(s.t, x, x0)

    def churned(
        self, estimate: DenoiserCall, x: Tensor, t: TimePoint, draws: Draws | None, i: int
    ) -> tuple[Tensor, TimePoint]:
        """Where step ``i`` starts; ``Churn`` goes back a little towards noise first."""
        return x, t


def transition(t: TimePoint, s: TimePoint) -> tuple[float, float]:
    """a and b of one step of the forward process, x_t = a x_s + b eps, where s < t."""
    a = t.alpha / s.alpha
    return a, math.sqrt(max(t.sigma**2 - (a * s.sigma) ** 2, 0.0))


def add_noise(x: Tensor, std: float, draws: Draws | None, i: int) -> Tensor:
    """``x`` with the fresh noise of step ``i``, which is each sample's own at any batch size."""
    if std == 0 or draws is None:
        return x
    return x + std * draws.normal(f"step {i}", x.shape[1:]).to(x)


def sample(
    sampler: Sampler,
    denoiser: Estimator,
    noise: Tensor,
    label: Tensor | None = None,
    draws: Draws | None = None,
    *,
    clip: Range | None = (-1.0, 1.0),
) -> Tensor:
    """Return the x_0 ``(b, c, h, w)`` of the last step, within ``clip``.

    Arguments and errors are those of ``Sampler.__call__``.
    """
    steps = sampler(denoiser, noise, label, draws, clip=clip)
    x0 = deque(steps, maxlen=1).pop().x
    return x0 if clip is None else x0.clamp(*clip)
