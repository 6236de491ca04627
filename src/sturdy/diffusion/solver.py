"""Samplers for few steps: multistep solvers of the ODE, their stochastic form, and EDM's churn.

With l = log(alpha / sigma), h = l_s - l_t and D along the step, the ODE is solved by (Lu et al.
2022, DPM-Solver++)

    x_s = sigma_s / sigma_t x_t + alpha_s integral_0^h e^(u - h) D(l_t + u) du

D is extrapolated from the steps before, without further calls of the network. The first step is of
order one, and so is the last, where h is infinite. Nothing is extrapolated from a time at which
alpha is 0, for there l is infinite.
"""

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor
from typing_extensions import override

from exact_resume.randomness import Draws
from sturdy.diffusion.sampler import (
    DenoiserCall,
    Heun,
    Sampler,
    Step,
    TimePoint,
    add_noise,
    transition,
)

Estimate = tuple[TimePoint, Tensor]  # a time and D there, (b, c, h, w)


class DPMSolver(Sampler):
    """DPM-Solver++(2M), and with ``eta`` above 0 its SDE form (Lu et al. 2022, alg. 2).

    x_s = sigma_s / sigma_t k x_t + alpha_s (1 - k e^-h) (D + h / 2 dD/dl) + sigma_s sqrt(1 - k^2)
    z,    k = e^(-eta h)

    One call a step, order 2.

    Args:
        steps: as of ``Sampler``, like the others.
        eta: share of noise: 0 is the ODE, 1 the SDE-DPM-Solver++(2M) of the paper's appendix.

    Raises:
        ValueError: ``eta`` below 0.
    """

    def __init__(
        self,
        steps: int = 15,
        *,
        eta: float = 0.0,
        spacing: str = "time",
        power: float = 2.0,
        start: float = 1.0,
    ) -> None:
        super().__init__(steps, spacing=spacing, power=power, start=start)
        if eta < 0:
            raise ValueError(f"eta={eta} must be 0 (deterministic) or more; 1 is the SDE")
        self.eta = eta
        self.random = eta > 0

    @override
    def integrate(
        self, estimate: DenoiserCall, x: Tensor, points: list[TimePoint], draws: Draws | None
    ) -> Iterator[Step]:
        before: Estimate | None = None
        for i, (t, s) in enumerate(pairwise(points)):
            x0, _ = estimate(x, t)
            middle = x0  # D in the middle of the step
            if before and before[0].alpha > 0 and s.sigma > 0:
                ratio = log_snr_step(t, s) / log_snr_step(before[0], t)
                middle = x0 + ratio / 2 * (x0 - before[1])
            keep = exp_neg_h(t, s) ** self.eta
            x = s.sigma / t.sigma * keep * x + s.alpha * (1 - keep * exp_neg_h(t, s)) * middle
            x = add_noise(x, s.sigma * math.sqrt(1 - keep**2), draws, i)
            before = (t, x0)
            yield Step(s.t, x, x0)


class UniPC(Sampler):
    """Predicts like DPM-Solver++, and corrects with the next step's D at no cost.

    Source: Zhao et al. 2023, alg. 1 and 2. One call a step; order ``order`` + 1. ``Step.x`` is the
    prediction, which the next step starts by correcting.

    Args:
        steps: as of ``Sampler``, like the others.
        order: number of estimates that D is extrapolated from; 2 for guided, 3 for unguided
            sampling.

    Raises:
        ValueError: ``order`` is not 1, 2 or 3.
    """

    def __init__(
        self,
        steps: int = 15,
        *,
        order: int = 2,
        spacing: str = "time",
        power: float = 2.0,
        start: float = 1.0,
    ) -> None:
        super().__init__(steps, spacing=spacing, power=power, start=start)
        if order not in (1, 2, 3):
            raise ValueError(f"order={order} must be 1, 2 or 3")
        self.order = order

    @override
    def integrate(
        self, estimate: DenoiserCall, x: Tensor, points: list[TimePoint], draws: Draws | None
    ) -> Iterator[Step]:
        history: list[Estimate] = []
        start = x  # the corrected state at the start of the last step
        for i, (t, s) in enumerate(pairwise(points)):
            x0, _ = estimate(x, t)
            if history:
                x = unipc_update(start, history, t, next_x0=x0)
            start = x
            order = min(self.order, self.steps - i)  # the last steps are long, and extrapolate less
            usable = [each for each in history if each[0].alpha > 0]
            history = [*usable, (t, x0)][-order:]
            x = unipc_update(x, history, s)
            yield Step(s.t, x, x0)


class Churn(Heun):
    """EDM's stochastic sampler (Karras et al. 2022, alg. 2).

    Before each Heun step it goes back a little towards noise. This corrects the errors of earlier
    steps and needs more of them. At t = 1 it does not go back.

    Args:
        steps: as of ``Sampler``, like the others.
        churn: S_churn: the noise level rises by churn / steps, but at most by sqrt(2) - 1, before
            each step.
        lowest: S_tmin: the lowest noise level sigma / alpha at which it rises.
        highest: S_tmax: the highest one.
        inflation: S_noise: standard deviation of the added noise, slightly above 1 for networks
            that remove too much.

    Raises:
        ValueError: ``churn`` below 0.
    """

    def __init__(
        self,
        steps: int = 50,
        *,
        churn: float = 20.0,
        lowest: float = 0.05,
        highest: float = 50.0,
        inflation: float = 1.0,
        spacing: str = "karras",
        power: float = 2.0,
        start: float = 1.0,
    ) -> None:
        super().__init__(steps, spacing=spacing, power=power, start=start)
        if churn < 0:
            raise ValueError(f"churn={churn} must be 0 (deterministic) or more")
        self.gamma = min(churn / steps, math.sqrt(2) - 1)
        self.lowest = lowest
        self.highest = highest
        self.inflation = inflation
        self.random = churn > 0

    @override
    def add_churn(
        self, estimate: DenoiserCall, x: Tensor, t: TimePoint, draws: Draws | None, i: int
    ) -> tuple[Tensor, TimePoint]:
        if not self.random or not self.lowest * t.alpha <= t.sigma <= self.highest * t.alpha:
            return x, t
        level = (1 + self.gamma) * t.sigma / t.alpha
        ratio = torch.tensor([level], dtype=torch.float64, device="cpu")
        (back,) = estimate.time_points(estimate.denoiser.schedule.time(ratio).tolist())
        a, b = transition(back, t)
        return add_noise(a * x, self.inflation * b, draws, i), back


def log_snr_step(t: TimePoint, s: TimePoint) -> float:
    """Return h of the step from ``t`` to ``s``; both alphas and sigmas are above 0."""
    return math.log(s.alpha / s.sigma) - math.log(t.alpha / t.sigma)


def exp_neg_h(t: TimePoint, s: TimePoint) -> float:
    """Return e^-h, 0 where h is infinite."""
    return s.sigma * t.alpha / (s.alpha * t.sigma)


def unipc_update(
    x: Tensor, history: list[Estimate], s: TimePoint, next_x0: Tensor | None = None
) -> Tensor:
    """Return the state at ``s``, ``(b, c, h, w)``.

    D = D_t + sum_k w_k (D_k - D_t), at nodes (l_k - l_t) / h.

    Args:
        x: the state at the last time of ``history``.
        history: estimates that D goes through.
        s: the next time.
        next_x0: D at ``s``, for the correction; it then goes through this, too.
    """
    t, x0 = history[-1]
    total = 1 - exp_neg_h(t, s)
    nodes = [(log_snr_step(t, at) / log_snr_step(t, s), d) for at, d in history[:-1]]
    if next_x0 is not None:
        nodes.append((1.0, next_x0))
    change = total * x0
    if len(nodes) == 1:  # exact as h -> 0, and here h may be infinite: the paper's B(h) = e^h - 1
        ((node, d),) = nodes
        change = change + total / 2 / node * (d - x0)
    elif nodes:
        weights = quadrature_weights([node for node, _ in nodes], log_snr_step(t, s))
        for weight, (_, d) in zip(weights, nodes, strict=True):
            change = change + weight * (d - x0)
    return s.sigma / t.sigma * x + s.alpha * change


def quadrature_weights(nodes: list[float], h: float) -> list[float]:
    """Return w with which polynomials are integrated exactly.

    sum_k w_k node_k^j = integral_0^h e^(u - h) (u / h)^j du, j = 1 ... n.
    """
    moments = [-math.expm1(-h)]
    for j in range(1, len(nodes) + 1):
        moments.append(1 - j / h * moments[-1])  # by parts
    powers = torch.tensor(
        [[node**j for node in nodes] for j in range(1, len(nodes) + 1)], dtype=torch.float64
    )
    return torch.linalg.solve(powers, torch.tensor(moments[1:], dtype=torch.float64)).tolist()
