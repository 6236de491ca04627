"""The shares of signal and noise at time t.

x_t = alpha(t) x_0 + sigma(t) eps,    t in [0, 1]: 0 is data, 1 is noise
"""

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from sturdy.image_size import ImageSize, height_and_width

STEPS = 1000  # betas in a table; beta_i, i = 0 ... 999, leads to t = (i + 1) / 1000


class Schedule(ABC):
    """The contract: ``schedule(t) -> (alpha, sigma)``; ``time`` and ``slope`` follow from it.

    With t, alpha falls from exactly 1, or stays there, and sigma rises from exactly 0. A schedule
    is no ``nn.Module``: nothing of it is in a checkpoint.
    """

    @abstractmethod
    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma ``(b,)`` at times ``(b,)`` in [0, 1].

        They have the dtype and the device of ``t``.
        """

    def time(self, ratio: Tensor) -> Tensor:
        """Return the t ``(b,)`` at which sigma / alpha is ``ratio`` ``(b,)``, on the CPU.

        1 if it is never that large. By bisection in float64, as the ratio rises with t; override it
        with a formula if there is one.
        """
        low = torch.zeros_like(ratio, dtype=torch.float64)
        high = torch.ones_like(ratio, dtype=torch.float64)
        for _ in range(60):
            middle = (low + high) / 2
            alpha, sigma = self(middle)
            beyond = sigma > ratio.double() * alpha
            low = torch.where(beyond, low, middle)
            high = torch.where(beyond, middle, high)
        return high.to(ratio.dtype)

    def slope(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return dalpha/dt and dsigma/dt ``(b,)`` at times in (0, 1] on the CPU.

        By central differences in float64.
        """
        t = t.double()
        before = t * (1 - 1e-6)
        after = (t * (1 + 1e-6)).clamp(max=1)
        alpha_before, sigma_before = self(before)
        alpha_after, sigma_after = self(after)
        width = after - before
        return (alpha_after - alpha_before) / width, (sigma_after - sigma_before) / width


class RectifiedFlow(Schedule):
    """A straight line to noise: alpha = 1 - t, sigma = t (Liu et al. 2023, Lipman et al. 2023)."""

    @override
    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t

    @override
    def time(self, ratio: Tensor) -> Tensor:
        return 1 / (1 + 1 / ratio)


class VarianceExploding(Schedule):
    """EDM's schedule: alpha = 1, and sigma up to ``sigma_max`` (Karras et al. 2022, tab. 1).

    sigma = sigma_min ((1 + c t)^rho - 1), with c such that sigma(1) = sigma_max: even times are
    nearly the steps of the paper's eq. 5, and yet sigma(0) = 0. Its exact steps are the sampler's
    ``spacing=karras``.
    """

    def __init__(
        self, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
    ) -> None:
        self.sigma_min = sigma_min
        self.rho = rho
        self.c = math.expm1(math.log1p(sigma_max / sigma_min) / rho)

    @override
    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), self.sigma_min * torch.expm1(self.rho * torch.log1p(self.c * t))

    @override
    def time(self, ratio: Tensor) -> Tensor:
        return (torch.expm1(torch.log1p(ratio / self.sigma_min) / self.rho) / self.c).clamp(max=1)


class Discrete(Schedule):
    """A variance-preserving chain of betas.

    alpha-bar_i = prod_{j<=i} (1 - beta_j) (Ho et al. 2020, eq. 4), alpha = sqrt(alpha-bar) and
    sigma = sqrt(1 - alpha-bar). Between its knots t = i / len(betas), where it is exact, log
    alpha-bar is linear: that is the VP process with a piecewise constant beta(t) (Song,
    Sohl-Dickstein et al. 2021, eq. 11). Unlike log-SNR it is finite at t = 0, where alpha-bar = 1.

    Args:
        betas: ``(n,)`` in (0, 1), on the CPU.
    """

    def __init__(self, betas: Tensor) -> None:
        log_alpha_bar = F.pad(torch.log1p(-betas.double()).cumsum(0), (1, 0))
        self._tables = {log_alpha_bar.device: log_alpha_bar}

    @override
    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        table = self._table(t.device)
        position = t.to(table.dtype) * (len(table) - 1)
        i = position.long().clamp(0, len(table) - 2)
        log_alpha_bar = torch.lerp(table[i], table[i + 1], position - i)
        alpha = (log_alpha_bar / 2).exp()
        sigma = (-log_alpha_bar.expm1()).sqrt()
        return alpha.to(t.dtype), sigma.to(t.dtype)

    @override
    def time(self, ratio: Tensor) -> Tensor:
        table = self._table(ratio.device)
        log_alpha_bar = -ratio.double().square().log1p()
        i = torch.searchsorted(-table, -log_alpha_bar).clamp(1, len(table) - 1) - 1
        position = i + (log_alpha_bar - table[i]) / (table[i + 1] - table[i])
        return (position / (len(table) - 1)).clamp(max=1).to(ratio.dtype)

    def _table(self, device: torch.device) -> Tensor:
        """Return log alpha-bar at the knots, float64 ``(n + 1,)``, copied to each device once."""
        if device not in self._tables:
            # Apple's GPUs have no float64
            dtype = torch.float32 if device.type == "mps" else torch.float64
            self._tables[device] = self._tables[torch.device("cpu")].to(device, dtype)
        return self._tables[device]


class Linear(Discrete):
    """DDPM's schedule: betas on a line (Ho et al. 2020, sec. 4)."""

    def __init__(self, *, beta_start: float = 1e-4, beta_end: float = 0.02) -> None:
        super().__init__(
            torch.linspace(beta_start, beta_end, STEPS, dtype=torch.float64, device="cpu")
        )


class ScaledLinear(Discrete):
    """Stable Diffusion's schedule: the roots of the betas on a line.

    Source: the published code of Rombach et al. 2022.
    """

    def __init__(self, *, beta_start: float = 0.00085, beta_end: float = 0.012) -> None:
        roots = torch.linspace(
            beta_start**0.5, beta_end**0.5, STEPS, dtype=torch.float64, device="cpu"
        )
        super().__init__(roots.square())


class Cosine(Discrete):
    """iDDPM's schedule: alpha-bar is a squared cosine, and betas are clipped.

    Source: Nichol & Dhariwal 2021, eq. 17.
    """

    def __init__(self, *, offset: float = 0.008, beta_max: float = 0.999) -> None:
        i = torch.arange(STEPS + 1, dtype=torch.float64, device="cpu")
        alpha_bar = torch.cos((i / STEPS + offset) / (1 + offset) * math.pi / 2).square()
        super().__init__((1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=beta_max))


class Shifted(Schedule):
    """``schedule`` with sigma / alpha times f = image_size / base_size, on the same curve.

    In a larger image the same noise hides less, as neighbouring pixels agree; f makes up for it.
    Training and sampling both follow, as both use times of the schedule. Where alpha^2 + sigma^2 =
    1 that is Hoogeboom et al. 2023, sec. 3.1 (log-SNR - 2 log f), where alpha + sigma = 1 it is
    Esser et al. 2024, eq. 23.

    Args:
        schedule: with alpha + sigma = 1 or alpha^2 + sigma^2 = 1.
        image_size: height and width of the images; of a pair, the side of the square of as many
            pixels counts.
        base_size: the size at which ``schedule`` is not changed.

    Raises:
        ValueError: ``schedule`` is on neither curve, or a size is not above 0.
    """

    def __init__(self, schedule: Schedule, *, image_size: ImageSize, base_size: int = 32) -> None:
        if min(height_and_width(image_size)) < 1 or base_size < 1:
            raise ValueError(f"image_size={image_size} and base_size={base_size} must be above 0")
        alpha, sigma = schedule(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64, device="cpu"))
        one = torch.ones_like(alpha)
        if torch.allclose(alpha + sigma, one, atol=1e-6):
            self.p = 1
        elif torch.allclose(alpha**2 + sigma**2, one, atol=1e-6):
            self.p = 2
        else:
            raise ValueError(
                "schedule=shifted is for schedules with alpha + sigma = 1 or alpha^2 + sigma^2 = "
                "1; for schedule=variance_exploding add log(image_size / 32) to "
                "objective.time.mean instead"
            )
        self.schedule = schedule
        self.factor = math.sqrt(math.prod(height_and_width(image_size))) / base_size

    @override
    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.schedule(t)
        sigma = self.factor * sigma
        length = (alpha**self.p + sigma**self.p) ** (1 / self.p)
        return alpha / length, sigma / length

    @override
    def time(self, ratio: Tensor) -> Tensor:
        return self.schedule.time(ratio / self.factor)
