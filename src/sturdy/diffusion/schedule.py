"""How much picture and how much noise there is at time t.

x_t = alpha(t) x_0 + sigma(t) eps,    t in [0, 1]: 0 is data, 1 is noise
"""

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

STEPS = 1000  # betas in a table; beta_i, i = 0 ... 999, is the one that leads to t = (i + 1) / 1000


class Schedule(ABC):
    """One contract: ``schedule(t) -> (alpha, sigma)``.

    With t, alpha falls from exactly 1 and sigma rises from exactly 0. Plain objects: nothing of them
    belongs into a checkpoint.
    """

    @abstractmethod
    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Times ``(b,)`` in [0, 1] to alpha and sigma ``(b,)``, in the dtype and on the device of ``t``."""


class RectifiedFlow(Schedule):
    """A straight line to noise: alpha = 1 - t, sigma = t (Liu et al. 2023, Lipman et al. 2023)."""

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t


class Discrete(Schedule):
    """A variance-preserving chain of betas: alpha-bar_i = prod_{j<=i} (1 - beta_j) (Ho et al. 2020, eq. 4).

    alpha = sqrt(alpha-bar) and sigma = sqrt(1 - alpha-bar). Between its knots t = i / len(betas), where it
    is exact, log alpha-bar is linear: that is the VP process with a piecewise constant beta(t) (Song,
    Sohl-Dickstein et al. 2021, eq. 11). Unlike log-SNR it is finite at t = 0, where alpha-bar = 1.

    Args:
        betas: ``(n,)`` in (0, 1), on the CPU.
    """

    def __init__(self, betas: Tensor) -> None:
        log_alpha_bar = F.pad(torch.log1p(-betas.double()).cumsum(0), (1, 0))
        self._tables = {log_alpha_bar.device: log_alpha_bar}

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        table = self._table(t.device)
        position = t.to(table.dtype) * (len(table) - 1)
        i = position.long().clamp(0, len(table) - 2)
        log_alpha_bar = torch.lerp(table[i], table[i + 1], position - i)
        alpha, sigma = (log_alpha_bar / 2).exp(), (-log_alpha_bar.expm1()).sqrt()
        return alpha.to(t.dtype), sigma.to(t.dtype)

    def _table(self, device: torch.device) -> Tensor:
        """log alpha-bar at the knots ``(n + 1,)``, in float64, copied to each device once."""
        if device not in self._tables:
            dtype = torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64
            self._tables[device] = self._tables[torch.device("cpu")].to(device, dtype)
        return self._tables[device]


class Linear(Discrete):
    """DDPM's schedule: betas on a line (Ho et al. 2020, sec. 4)."""

    def __init__(self, *, beta_start: float = 1e-4, beta_end: float = 0.02) -> None:
        super().__init__(torch.linspace(beta_start, beta_end, STEPS, dtype=torch.float64, device="cpu"))


class Cosine(Discrete):
    """iDDPM's schedule: alpha-bar is a squared cosine, betas are clipped (Nichol & Dhariwal 2021, eq. 17)."""

    def __init__(self, *, offset: float = 0.008, beta_max: float = 0.999) -> None:
        i = torch.arange(STEPS + 1, dtype=torch.float64, device="cpu")
        alpha_bar = torch.cos((i / STEPS + offset) / (1 + offset) * math.pi / 2).square()
        super().__init__((1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=beta_max))
