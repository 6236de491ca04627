"""The times of a sampler: 1 = t_0 > t_1 > ... > t_n = 0.

time:     t_i = (1 - i / n)^power
karras:   r_i = (max^(1/7) + i / (n - 1) (min^(1/7) - max^(1/7)))^7,    r = sigma / alpha
log_snr:  r_i = max (min / max)^(i / (n - 1))

The last two choose levels of noise and are the same under every schedule, except for the first
step, which starts at t = 1 whatever its r, and the last, which ends at r = 0.
"""

from collections.abc import Callable

import torch

from sturdy.diffusion.schedule import Schedule

# Karras et al. 2022, tab. 1: a quarter of an 8-bit shade, and hardly any signal
RATIO_MIN = 0.002
RATIO_MAX = 80.0
RHO = 7.0

Spacing = Callable[[Schedule, int, float], list[float]]  # the schedule, n and power -> n + 1 times


def time(schedule: Schedule, steps: int, power: float) -> list[float]:
    """Return times that are even with power 1, and denser near data with more.

    With power 1 that is the "trailing" of Lin et al. 2024, tab. 2.
    """
    return [((steps - i) / steps) ** power for i in range(steps + 1)]


def karras(schedule: Schedule, steps: int, power: float) -> list[float]:
    """Return the times of Karras et al. 2022, eq. 5 with rho = 7, without ``power``."""
    high, low = ends(schedule)
    a = high ** (1 / RHO)
    b = low ** (1 / RHO)
    ratios = [(a + i / max(steps - 1, 1) * (b - a)) ** RHO for i in range(steps)]
    return from_ratios(schedule, ratios)


def log_snr(schedule: Schedule, steps: int, power: float) -> list[float]:
    """Return times even in log SNR (Lu et al. 2022, DPM-Solver, sec. 3.3) without ``power``."""
    high, low = ends(schedule)
    ratios = [high * (low / high) ** (i / max(steps - 1, 1)) for i in range(steps)]
    return from_ratios(schedule, ratios)


def ends(schedule: Schedule) -> tuple[float, float]:
    """Return the largest and the smallest sigma / alpha above 0."""
    alpha, sigma = (c.item() for c in schedule(torch.ones(1, dtype=torch.float64, device="cpu")))
    high = min(RATIO_MAX, sigma / alpha) if alpha else RATIO_MAX
    return high, min(RATIO_MIN, high / 2)


def from_ratios(schedule: Schedule, ratios: list[float]) -> list[float]:
    """Return the times at which sigma / alpha is as given; the first is 1, and 0 is added."""
    times = schedule.time(torch.tensor(ratios[1:], dtype=torch.float64, device="cpu")).tolist()
    return [1.0, *times, 0.0]


SPACINGS: dict[str, Spacing] = {"time": time, "karras": karras, "log_snr": log_snr}
