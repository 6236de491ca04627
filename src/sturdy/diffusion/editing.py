"""Editing with any sampler: fill a hole, or sample again from a noise level on.

Both change only the inputs of the sampler: the denoiser, or the end of its schedule. No model is
trained for it.
"""

from copy import copy

import torch
from torch import Tensor
from typing_extensions import override

from exact_resume.randomness import Draws
from sturdy.diffusion.condition import Condition
from sturdy.diffusion.sampler import PIXEL_RANGE, Estimator, Range, Sampler, sample
from sturdy.diffusion.schedule import Schedule


class InpaintingDenoiser:
    """A denoiser that knows part of x_0: D = mask D + (1 - mask) known.

    The known part of x_t then follows by itself: a deterministic sampler moves it along alpha known
    + sigma noise, a random one through q(x_s | x_t, known). That is the replacement of known pixels
    at every step (Song, Sohl-Dickstein et al. 2021, app. I.2). Its limit: the new part sees the
    known part only as noisy as itself, and follows it too little. Samplers that return to more
    noise correct this in part (as Lugmayr et al. 2022 do): best Churn with many steps and much
    churn, least the deterministic ones.

    Args:
        denoiser: plain or guided.
        known: x_0 ``(b, c, h, w)``.
        mask: broadcasts with ``known``: 1 is sampled, 0 is kept.

    Raises:
        ValueError: the mask has other values, or does not fit ``known``.
    """

    def __init__(self, denoiser: Estimator, known: Tensor, mask: Tensor) -> None:
        try:
            fits = torch.broadcast_shapes(mask.shape, known.shape) == known.shape
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"a mask of shape {tuple(mask.shape)} does not fit images {tuple(known.shape)}"
            )
        if not ((mask == 0) | (mask == 1)).all():
            raise ValueError("the mask must be 0 (kept) or 1 (painted) everywhere; round it")
        self.denoiser = denoiser
        self.known = known
        self.mask = mask.to(known.device, torch.bool)
        self.schedule = denoiser.schedule

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition | Tensor | None = None) -> Tensor:
        """Return the estimate of x_0, ``(b, c, h, w)``."""
        return torch.where(self.mask, self.denoiser(x_t, t, cond), self.known)


class TruncatedSchedule(Schedule):
    """The part of ``schedule`` from data up to t = ``end``, as times from 0 to 1."""

    def __init__(self, schedule: Schedule, end: float) -> None:
        self.schedule = schedule
        self.end = end

    @override
    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.schedule(self.end * t)

    @override
    def time(self, ratio: Tensor) -> Tensor:
        return (self.schedule.time(ratio) / self.end).clamp(max=1)


class TruncatedDenoiser:
    """A denoiser whose time 1 is t = ``end`` of ``denoiser``, for sampling that starts there."""

    def __init__(self, denoiser: Estimator, end: float) -> None:
        self.denoiser = denoiser
        self.end = end
        self.schedule: Schedule = TruncatedSchedule(denoiser.schedule, end)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition | Tensor | None = None) -> Tensor:
        """Return the estimate of x_0, ``(b, c, h, w)``."""
        return self.denoiser(x_t, self.end * t, cond)


def inpaint(
    sampler: Sampler,
    denoiser: Estimator,
    noise: Tensor,
    known: Tensor,
    mask: Tensor,
    cond: Condition | Tensor | None = None,
    draws: Draws | None = None,
    *,
    clip: Range | None = PIXEL_RANGE,
) -> Tensor:
    """Return x_0 ``(b, c, h, w)`` that is ``known`` where ``mask`` is 0.

    Arguments are as of ``sample`` and ``InpaintingDenoiser``.
    """
    inpainting = InpaintingDenoiser(denoiser, known, mask)
    return sample(sampler, inpainting, noise, cond, draws, clip=clip)


def image_to_image(
    sampler: Sampler,
    denoiser: Estimator,
    noise: Tensor,
    original: Tensor,
    strength: float,
    cond: Condition | Tensor | None = None,
    draws: Draws | None = None,
    *,
    clip: Range | None = PIXEL_RANGE,
) -> Tensor:
    """Sample again from ``original`` with noise at t = ``strength`` (SDEdit, Meng et al. 2022).

    All steps of the sampler are used. Its own ``start`` is for sampling from pure noise, and does
    not count here. The other arguments are as of ``sample``.

    Args:
        sampler: is not changed.
        denoiser: plain or guided.
        noise: ``(b, c, h, w)``, standard normal.
        original: x_0 ``(b, c, h, w)``.
        strength: in (0, 1]: little changes near 0, and at 1 only alpha(1) of ``original``, often
            nothing, remains.
        cond: as of ``sample``.
        draws: as of ``sample``.
        clip: as of ``sample``.

    Raises:
        ValueError: ``strength`` outside (0, 1], and as of ``sample``.
    """
    if not 0 < strength <= 1:
        raise ValueError(
            f"strength={strength} must be above 0, where nothing changes, and at most 1"
        )
    sampler = copy(sampler)
    sampler.start = 1.0
    truncated = TruncatedDenoiser(denoiser, strength)
    end = torch.ones(1, dtype=torch.float64, device="cpu")
    alpha, sigma = (coefficient.item() for coefficient in truncated.schedule(end))
    # Samplers start at sigma(1) noise; in these terms this is alpha original + sigma noise.
    start = noise + alpha / sigma * original
    return sample(sampler, truncated, start, cond, draws, clip=clip)
