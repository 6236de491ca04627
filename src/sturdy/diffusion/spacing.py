"""Where a walk stops on its way from noise: times 1 = t_0 > t_1 > ... > t_n = 0.

time:     t_i = (1 - i / n)^power
karras:   r_i = (max^(1/7) + i / (n - 1) (min^(1/7) - max^(1/7)))^7,    r = sigma / alpha
log_snr:  r_i = max (min / max)^(i / (n - 1))

The last two choose levels of noise and are the same walk under every schedule, up to its first
step, which starts at t = 1 whatever its r, and its last, which ends at r = 0.
"""

from collections.abc import Callable

import torch

from sturdy.diffusion.schedule import Schedule

RATIO_MIN, RATIO_MAX = (
    0.002,
    80.0,
)  # Karras et al. 2022, tab. 1: a quarter of an 8-bit shade, and hardly any picture
RHO = 7.0

Spacing = Callable[[Schedule, int, float], list[float]]  # the schedule, n and power -> n + 1 times


def time(schedule: Schedule, steps: int, power: float) -> list[float]:
    """Even times with power 1, the "trailing" of Lin et al. 2024, tab. 2; denser near data with
    more.
    """
    return [((steps - i) / steps) ** power for i in range(steps + 1)]


def karras(schedule: Schedule, steps: int, power: float) -> list[float]:
    """Karras et al. 2022, eq. 5 with rho = 7; ``power`` is not used."""
    high, low = ends(schedule)
    a, b = high ** (1 / RHO), low ** (1 / RHO)
    return from_ratios(
        schedule, [(a + i / max(steps - 1, 1) * (b - a)) ** RHO for i in range(steps)]
    )


def log_snr(schedule: Schedule, steps: int, power: float) -> list[float]:
    """Even in log SNR (Lu et al. 2022, DPM-Solver, sec. 3.3); ``power`` is not used."""
    high, low = ends(schedule)
    return from_ratios(
        schedule, [high * (low / high) ** (i / max(steps - 1, 1)) for i in range(steps)]
    )


def ends(schedule: Schedule) -> tuple[float, float]:
    """The largest and smallest sigma / alpha above 0 to stop at."""
    alpha, sigma = (c.item() for c in schedule(torch.ones(1, dtype=torch.float64, device="cpu")))
    high = min(RATIO_MAX, sigma / alpha) if alpha else RATIO_MAX
    return high, min(RATIO_MIN, high / 2)


def from_ratios(schedule: Schedule, ratios: list[float]) -> list[float]:
    """The times at which sigma / alpha is as given, but 1 for the first, and 0 at the end."""
    times = schedule.time(torch.tensor(ratios[1:], dtype=torch.float64, device="cpu")).tolist()
    return [1.0, *times, 0.0]


SPACINGS: dict[str, Spacing] = {"time": time, "karras": karras, "log_snr": log_snr}
