"""Every combination that makes sense against closed forms, in tables: `pytest -s
tests/diffusion/test_table.py`.

On the Gaussian all is known: where a deterministic walk ends, the moments of a random one's end,
    and the loss that no
network can get below.
"""

import math
from itertools import pairwise, product

import pytest
import torch
from gaussian import (
    MU,
    PAIRS,
    REFUSED,
    SCHEDULES,
    SIGMA_DATA,
    TARGETS,
    Exact,
    Ideal,
    S,
    TwoPeaks,
    derivatives,
    exact_walk,
)
from torch import nn

from exact_resume.randomness import Draws
from sturdy.diffusion import (
    DDIM,
    DDPM,
    Churn,
    Constant,
    Denoiser,
    DPMSolver,
    Euler,
    Heun,
    LogitNormal,
    LogNormal,
    MinSNR,
    Objective,
    Sigmoid,
    Uniform,
    UniPC,
    V,
)

NOISE = torch.randn(16, 1, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
N = 20
# with the largest error in N steps, in units of the picture, whose standard deviation is 0.25
SAMPLERS = {
    "DDPM": (lambda n, **o: DDPM(n, **o), 0.07),
    "DDIM": (lambda n, **o: DDIM(n, **o), 0.14),
    "eta=1/2": (lambda n, **o: DDIM(n, eta=0.5, **o), 0.05),
    "Euler": (lambda n, **o: Euler(n, **o), 0.14),
    "Heun": (lambda n, **o: Heun(n, **o), 0.05),
    "2M": (lambda n, **o: DPMSolver(n, **o), 0.02),
    "2M-SDE": (lambda n, **o: DPMSolver(n, eta=1, **o), 0.012),
    "UniPC-2": (lambda n, **o: UniPC(n, **o), 0.014),
    "UniPC-3": (lambda n, **o: UniPC(n, order=3, **o), 0.002),
    "Churn": (lambda n, **o: Churn(n, **o), 0.03),
}


class Impulses(Draws):
    """One unit of noise at one step for each sample but the first, and at no other step."""

    def normal(self, purpose, shape=()):
        out = torch.zeros(len(self), *shape, dtype=torch.float64)
        out[2 + int(purpose.removeprefix("step "))] = 1
        return out


def moments(sampler, denoiser, clip):
    """Mean and standard deviation of a random walk's end, exactly.

    With Gaussian data the walk is affine in its start and in all its noise: one sample walks
        without any, one is
    given a unit of the start's and one a unit of each step's, and what these change adds up in
    squares.
    """
    n = sampler.steps + 2
    start = torch.zeros(n, 1, 1, 1, dtype=torch.float64)
    start[1] = 1
    *_, step = sampler(denoiser, start, None, Impulses(0, range(n)), clip=clip)
    mean, *moved = step.x.flatten().tolist()
    return mean, math.sqrt(sum((x - mean) ** 2 for x in moved))


def error(sampler, denoiser, clip=(-1, 1)):
    """The greatest of a deterministic walk's pixels; of a random walk's mean and standard
    deviation.
    """
    if sampler.random:
        mean, std = moments(sampler, denoiser, clip)
        return max(abs(mean - MU), abs(std - S))
    *_, step = sampler(denoiser, NOISE, clip=clip)
    return (step.x - exact_walk(denoiser.schedule, NOISE)).abs().max().item()


def table(title, columns, rows):
    lines = [f"{title:34}" + "".join(f"{column:>12}" for column in columns)]
    lines += [
        f"{name:34}" + "".join(f"{cell:>12}" for cell in cells) for name, cells in rows.items()
    ]
    print("\n" + "\n".join(lines))


def test_samplers_by_schedule_and_target():
    rows, wrong = {}, []
    for schedule, target in PAIRS:
        denoiser = Denoiser(Ideal(schedule, target), SCHEDULES[schedule], TARGETS[target])
        cells = []
        for name, (sampler, bound) in SAMPLERS.items():
            e = error(sampler(N, spacing="log_snr"), denoiser, clip=None)
            cells.append(f"{e:.5f}")
            wrong += [(schedule, target, name, e)] if not e < bound else []
        rows[f"{schedule} {target}"] = cells
    rows |= {f"{schedule} {target}": ["refused"] for schedule, target in sorted(REFUSED)}
    table(f"error, {N} steps, log_snr", SAMPLERS, rows)
    assert not wrong


@pytest.mark.parametrize("name", SAMPLERS)
def test_control_a_wrong_target_fails_the_table(name):
    class WrongV(V):
        def x0(self, prediction, x_t, alpha, sigma):
            return alpha * x_t + sigma * prediction

    sampler, bound = SAMPLERS[name]
    denoiser = Denoiser(Ideal("cosine", "v"), SCHEDULES["cosine"], WrongV())
    assert not error(sampler(N, spacing="log_snr"), denoiser, clip=None) < bound


def test_samplers_by_spacing():
    """The exact denoiser, so the target is out of it; a sampler's own power for times."""
    rows, wrong = {}, []
    for schedule, spacing in product(SCHEDULES, ("time", "karras", "log_snr")):
        denoiser = Exact(SCHEDULES[schedule])
        errors = [
            error(sampler(N, spacing=spacing), denoiser, clip=None)
            for sampler, _ in SAMPLERS.values()
        ]
        rows[f"{schedule} {spacing}"] = [f"{e:.5f}" for e in errors]
        bounds = [
            0.26 if ORDERS.get(name) == 1 else 0.06 for name in SAMPLERS
        ]  # some schedules' steps are long
        wrong += [
            (schedule, spacing, e) for e, bound in zip(errors, bounds, strict=True) if not e < bound
        ]
    table(f"error, {N} steps", SAMPLERS, rows)
    assert not wrong


ORDERS = {
    "DDPM": 1,
    "DDIM": 1,
    "eta=1/2": 1,
    "Euler": 1,
    "Heun": 2,
    "2M": 2,
    "2M-SDE": 2,
    "UniPC-2": 3,
}


def test_orders_of_convergence():
    """log2 of what twice the steps gain, from 20 to 40 and from 40 to 80; random walks by their
    moments.
    """
    rows, wrong = {}, []
    for schedule in SCHEDULES:
        cells = []
        for name, order in ORDERS.items():
            sampler, _ = SAMPLERS[name]
            denoiser = Exact(SCHEDULES[schedule])
            errors = [
                error(sampler(n, spacing="log_snr"), denoiser, clip=None) for n in (20, 40, 80)
            ]
            measured = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
            cells.append("{:.2f} {:.2f}".format(*measured))
            wrong += (
                [(schedule, name, measured)]
                if not all(order - 0.3 < m < order + 0.5 for m in measured)
                else []
            )
        rows[schedule] = cells
    table("order, Gaussian, log_snr", ORDERS, rows)
    assert not wrong


MIXTURE_ORDERS = {"DDIM": 1, "Euler": 1, "Heun": 2, "2M": 2, "UniPC-2": 3}


def test_orders_of_convergence_on_the_mixture():
    """By the mean distance from the quantile on which a pixel began, from 40 to 80 and 160
    steps.
    """
    rows, wrong, noise = {}, [], NOISE[:1]
    for schedule in ("linear", "cosine", "rectified_flow", "variance_exploding"):
        peaks, cells = TwoPeaks(SCHEDULES[schedule]), []
        for name, order in MIXTURE_ORDERS.items():
            errors = []
            for n in (40, 80, 160):
                *_, step = SAMPLERS[name][0](n, spacing="log_snr")(peaks, noise, clip=None)
                errors.append(peaks.off(step.x, noise).mean().item())
            measured = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
            cells.append("{:.2f} {:.2f}".format(*measured))
            wrong += (
                [(schedule, name, measured)]
                if not all(order - 0.3 < m < order + 0.6 for m in measured)
                else []
            )
        rows[schedule] = cells
    table("order, mixture, log_snr", MIXTURE_ORDERS, rows)
    assert not wrong


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_control_even_times_cost_heun_its_order_where_sigma_is_a_root(schedule):
    errors = [error(Heun(n, power=1), Exact(SCHEDULES[schedule]), clip=None) for n in (40, 80)]
    assert math.log2(errors[0] / errors[1]) < 1.7


TIMES = {"uniform": Uniform(), "logit_normal": LogitNormal(), "log_normal": LogNormal()}
WEIGHTS = {"constant": Constant(), "min_snr": MinSNR(), "sigmoid": Sigmoid(bias=-1.0)}


def least(target, alpha, sigma):
    """The variance of the target given x_t, which all networks have at least as loss.

    x_0 given x_t has variance s^2 sigma^2 / (alpha^2 s^2 + sigma^2), and eps = (x_t - alpha x_0) /
    sigma.
    """
    x0 = S**2 * sigma**2 / (alpha**2 * S**2 + sigma**2)
    c_out = sigma * SIGMA_DATA / (sigma**2 + alpha**2 * SIGMA_DATA**2) ** 0.5
    slope = {  # of the target in x_0, at a given x_t
        "noise": alpha / sigma,
        "x0": torch.ones_like(alpha),
        "v": (alpha**2 + sigma**2) / sigma,
        "velocity": (alpha + sigma) / sigma,
        "preconditioned": 1 / c_out,
    }
    return x0 * slope[target] ** 2, slope[target] ** 2


def weight_in_x0(weight, schedule, t):
    alpha, sigma = schedule(t)
    snr = (alpha / sigma) ** 2
    if weight == "min_snr":
        return snr.clamp(max=5)
    alpha_slope, sigma_slope = derivatives(schedule, t)
    return torch.sigmoid(-1 - snr.log()) * (sigma_slope / sigma - alpha_slope / alpha) * snr


def test_objectives_by_schedule_and_target():
    """The ideal network's loss over the least there is, sample by sample; 24,576 pixels: standard
    error 0.9 %.
    """
    draws, rows, wrong = Draws(0, range(32)), {}, []
    pictures = MU + S * torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    columns = [*product(TIMES, WEIGHTS)]
    for schedule, target in PAIRS:
        denoiser = Denoiser(Ideal(schedule, target).double(), SCHEDULES[schedule], TARGETS[target])
        cells = []
        for time, weight in columns:
            loss = Objective(time=TIMES[time], weight=WEIGHTS[weight])(
                denoiser, pictures, None, draws
            ).double()
            t = TIMES[time](draws, SCHEDULES[schedule]).double()
            expected, squared_slope = least(target, *SCHEDULES[schedule](t))
            if weight != "constant":
                expected = expected * weight_in_x0(weight, SCHEDULES[schedule], t) / squared_slope
            ratio = (loss / expected).mean().item()
            cells.append(f"{ratio:.4f}")
            wrong += [(schedule, target, time, weight, ratio)] if not abs(ratio - 1) < 0.03 else []
        rows[f"{schedule} {target}"] = cells
    titles = [f"{time[:5]}-{weight[:5]}" for time, weight in columns]
    table("loss of the ideal / least loss", titles, rows)
    assert not wrong


def test_control_another_network_has_more_loss():
    class Off(Ideal):
        def forward(self, x, t, label):
            return super().forward(x, t, label) + 0.3

    pictures = MU + S * torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    for schedule, target in PAIRS:
        networks = [
            Denoiser(kind(schedule, target), SCHEDULES[schedule], TARGETS[target])
            for kind in (Ideal, Off)
        ]
        ideal, off = (
            Objective()(network, pictures, None, Draws(0, range(32))) for network in networks
        )
        assert (off - ideal).mean().item() == pytest.approx(0.09, rel=0.25)


@pytest.mark.parametrize(("schedule", "target"), sorted(REFUSED))
def test_what_the_table_leaves_out_is_refused(schedule, target):
    with pytest.raises(ValueError, match=f"target={target} does not suit schedule="):
        Denoiser(nn.Identity(), SCHEDULES[schedule], TARGETS[target])
