"""Pictures from pictures, with any sampler: fill a hole, or draw a picture anew from some noise
level on.

Both only change what the sampler is handed: the denoiser, or the end of its schedule; no model is
    trained for it.
"""

from copy import copy

import torch
from torch import Tensor

from exact_resume.randomness import Draws
from sturdy.diffusion.sampler import Estimator, Range, Sampler, sample
from sturdy.diffusion.schedule import Schedule


class InpaintingDenoiser:
    """A denoiser that knows part of the picture: D = mask D + (1 - mask) picture.

    The known part of x_t then follows from itself: a deterministic walk takes it along alpha
        picture + sigma noise,
    a random one through q(x_s | x_t, picture). That is the replacement of known pixels at every
    step (Song, Sohl-Dickstein et al. 2021, app. I.2). Its limit: what is painted sees the known
    part only as noisy as itself and follows it too little. Samplers that return to more noise mend
    that in part (as Lugmayr et al. 2022 do): Churn with many steps and much churn listens best,
    deterministic ones least.

    Args:
        picture: ``(b, c, h, w)`` in [-1, 1].
        mask: what broadcasts with it: 1 is painted, 0 is kept.

    Raises:
        ValueError: the mask holds something else, or does not fit the picture.
    """

    def __init__(self, denoiser: Estimator, picture: Tensor, mask: Tensor) -> None:
        try:
            fits = torch.broadcast_shapes(mask.shape, picture.shape) == picture.shape
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"a mask of shape {tuple(mask.shape)} does not fit pictures {tuple(picture.shape)}"
            )
        if not ((mask == 0) | (mask == 1)).all():
            raise ValueError("the mask must be 0 (kept) or 1 (painted) everywhere; round it")
        self.denoiser, self.picture, self.mask = (
            denoiser,
            picture,
            mask.to(picture.device, torch.bool),
        )
        self.schedule = denoiser.schedule

    def __call__(self, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return torch.where(self.mask, self.denoiser(x_t, t, label), self.picture)


class TruncatedSchedule(Schedule):
    """The part of ``schedule`` from data up to t = ``end``, as times from 0 to 1."""

    def __init__(self, schedule: Schedule, end: float) -> None:
        self.schedule, self.end = schedule, end

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.schedule(self.end * t)

    def time(self, ratio: Tensor) -> Tensor:
        return (self.schedule.time(ratio) / self.end).clamp(max=1)


class TruncatedDenoiser:
    """A denoiser for walks that start at t = ``end``, as if that were 1."""

    def __init__(self, denoiser: Estimator, end: float) -> None:
        self.denoiser, self.end = denoiser, end
        self.schedule: Schedule = TruncatedSchedule(denoiser.schedule, end)

    def __call__(self, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return self.denoiser(x_t, self.end * t, label)


def inpaint(
    sampler: Sampler,
    denoiser: Estimator,
    noise: Tensor,
    picture: Tensor,
    mask: Tensor,
    label: Tensor | None = None,
    draws: Draws | None = None,
    *,
    clip: Range | None = (-1.0, 1.0),
) -> Tensor:
    """Pictures ``(b, c, h, w)`` that are ``picture`` where ``mask`` is 0; arguments as of
    ``sample``, ``InpaintingDenoiser``.
    """
    return sample(
        sampler, InpaintingDenoiser(denoiser, picture, mask), noise, label, draws, clip=clip
    )


def image_to_image(
    sampler: Sampler,
    denoiser: Estimator,
    noise: Tensor,
    picture: Tensor,
    strength: float,
    label: Tensor | None = None,
    draws: Draws | None = None,
    *,
    clip: Range | None = (-1.0, 1.0),
) -> Tensor:
    """Draw anew from ``picture`` at t = ``strength`` on, in all of the sampler's steps (Meng et al.
    2022, SDEdit).

    The sampler's own ``start`` is for walks that know nothing of a picture, and does not count
    here.

    Args:
        picture: ``(b, c, h, w)`` in [-1, 1].
        strength: in (0, 1]: little changes near 0, and at 1 what is left of ``picture`` is
            alpha(1), often nothing.

    Raises:
        ValueError: ``strength`` outside (0, 1], and as of ``sample``.
    """
    if not 0 < strength <= 1:
        raise ValueError(
            f"strength={strength} must be above 0, where nothing changes, and at most 1"
        )
    sampler = copy(sampler)
    sampler.start = 1.0
    there = TruncatedDenoiser(denoiser, strength)
    alpha, sigma = (
        c.item() for c in there.schedule(torch.ones(1, dtype=torch.float64, device="cpu"))
    )
    # Walks start at sigma(1) noise; this is alpha picture + sigma noise in their terms.
    return sample(sampler, there, noise + alpha / sigma * picture, label, draws, clip=clip)
