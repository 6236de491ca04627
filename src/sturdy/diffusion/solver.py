"""Samplers for few steps: multistep solvers of the same ODE, their stochastic form, and EDM's
churn.

With l = log(alpha / sigma), h = l_s - l_t and D along the step, the ODE is solved by (Lu et al.
2022, DPM-Solver++)

    x_s = sigma_s / sigma_t x_t + alpha_s integral_0^h e^(u - h) D(l_t + u) du

What is left is to extrapolate D from the steps before: no further calls of the network. The first
    step is of order
one, and so is the last, where h is infinite. Where alpha(t) is 0 nothing is extrapolated from, for
l is infinite.
"""

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

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

Known = tuple[TimePoint, Tensor]  # a knot and D there, (b, c, h, w)


class DPMSolver(Sampler):
    """DPM-Solver++(2M), and with ``eta`` above 0 its SDE form; one call a step, order 2 (Lu et al.
    2022, alg. 2):

    x_s = sigma_s / sigma_t k x_t + alpha_s (1 - k e^-h) (D + h / 2 dD/dl) + sigma_s sqrt(1 - k^2)
    z,    k = e^(-eta h)

    Args:
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
            raise ValueError(f"sampler.eta={eta} must be 0 (deterministic) or more; 1 is the SDE")
        self.eta = eta
        self.random = eta > 0

    def walk(
        self, estimate: DenoiserCall, x: Tensor, knots: list[TimePoint], draws: Draws | None
    ) -> Iterator[Step]:
        before: Known | None = None
        for i, (t, s) in enumerate(pairwise(knots)):
            x0, _ = estimate(x, t)
            middle = x0  # D in the middle of the step
            if before and before[0].alpha > 0 and s.sigma > 0:
                middle = x0 + width(t, s) / width(before[0], t) / 2 * (x0 - before[1])
            keep = decay(t, s) ** self.eta
            x = s.sigma / t.sigma * keep * x + s.alpha * (1 - keep * decay(t, s)) * middle
            x = add_noise(x, s.sigma * math.sqrt(1 - keep**2), draws, i)
            before = t, x0
            yield Step(s.t, x, x0)


class UniPC(Sampler):
    """Predicts like DPM-Solver++ and corrects with the next step's D, at no cost (Zhao et al. 2023,
    alg. 1 and 2).

    One call a step; order ``order`` + 1. ``Step.x`` is the prediction, which the next step starts
    by correcting.

    Args:
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
            raise ValueError(f"sampler.order={order} must be 1, 2 or 3")
        self.order = order

    def walk(
        self, estimate: DenoiserCall, x: Tensor, knots: list[TimePoint], draws: Draws | None
    ) -> Iterator[Step]:
        known: list[Known] = []
        start = x  # where the last step started, corrected
        for i, (t, s) in enumerate(pairwise(knots)):
            x0, _ = estimate(x, t)
            if known:
                x = advance(start, known, t, ahead=x0)
            start = x
            order = min(self.order, self.steps - i)  # the last steps are long, and extrapolate less
            known = [*[k for k in known if k[0].alpha > 0], (t, x0)][-order:]
            x = advance(start, known, s)
            yield Step(s.t, x, x0)


class Churn(Heun):
    """EDM's stochastic sampler: before each Heun step, go back a little towards noise (Karras et
    al. 2022, alg. 2).

    Corrects the errors of earlier steps and needs more of them. At t = 1 there is no going back.

    Args:
        churn: S_churn: the noise level rises by churn / steps, but at most by sqrt(2) - 1, before
            each step.
        lowest, highest: S_tmin and S_tmax: the noise levels sigma / alpha in which it does.
        inflation: S_noise: standard deviation of the noise put in, slightly above 1 for networks
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
            raise ValueError(f"sampler.churn={churn} must be 0 (deterministic) or more")
        self.gamma = min(churn / steps, math.sqrt(2) - 1)
        self.lowest, self.highest, self.inflation = lowest, highest, inflation
        self.random = churn > 0

    def churned(
        self, estimate: DenoiserCall, x: Tensor, t: TimePoint, draws: Draws | None, i: int
    ) -> tuple[Tensor, TimePoint]:
        if not self.random or not self.lowest * t.alpha <= t.sigma <= self.highest * t.alpha:
            return x, t
        ratio = torch.tensor(
            [(1 + self.gamma) * t.sigma / t.alpha], dtype=torch.float64, device="cpu"
        )
        (back,) = estimate.knots(estimate.denoiser.schedule.time(ratio).tolist())
        a, b = transition(back, t)
        return add_noise(a * x, self.inflation * b, draws, i), back


def width(t: TimePoint, s: TimePoint) -> float:
    """h of the step from ``t`` to ``s``; both alphas and sigmas above 0."""
    return math.log(s.alpha / s.sigma) - math.log(t.alpha / t.sigma)


def decay(t: TimePoint, s: TimePoint) -> float:
    """e^-h, 0 where h is infinite."""
    return s.sigma * t.alpha / (s.alpha * t.sigma)


def advance(x: Tensor, known: list[Known], s: TimePoint, ahead: Tensor | None = None) -> Tensor:
    """From ``x`` at the last known knot to ``s``, with D through all that is known, and through D
    ``ahead`` at ``s``.

    D = D_t + sum_k w_k (D_k - D_t), at nodes (l_k - l_t) / h.
    """
    t, x0 = known[-1]
    total = 1 - decay(t, s)
    nodes = [(width(t, knot) / width(t, s), d) for knot, d in known[:-1]]
    if ahead is not None:
        nodes.append((1.0, ahead))
    moved = total * x0
    if len(nodes) == 1:  # exact as h -> 0, and here h may be infinite: the paper's B(h) = e^h - 1
        ((node, d),) = nodes
        moved = moved + total / 2 / node * (d - x0)
    elif nodes:
        for weight, (_, d) in zip(
            weights([node for node, _ in nodes], width(t, s)), nodes, strict=True
        ):
            moved = moved + weight * (d - x0)
    return s.sigma / t.sigma * x + s.alpha * moved


def weights(nodes: list[float], h: float) -> list[float]:
    """w with sum_k w_k node_k^j = integral_0^h e^(u - h) (u / h)^j du, j = 1 ... n: polynomials
    come out exactly.
    """
    moments = [-math.expm1(-h)]
    for j in range(1, len(nodes) + 1):
        moments.append(1 - j / h * moments[-1])  # by parts
    powers = torch.tensor(
        [[node**j for node in nodes] for j in range(1, len(nodes) + 1)], dtype=torch.float64
    )
    return torch.linalg.solve(powers, torch.tensor(moments[1:], dtype=torch.float64)).tolist()
