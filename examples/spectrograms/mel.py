"""Sound to a log-mel spectrogram, and back.

    picture = dB(M |STFT(sound)|),    sound = griffin_lim(max(0, M+ 10^(picture / 20)))

M has a row for each band: a triangle of frequencies whose weights sum to 1. M+ is its
pseudo-inverse. The phase, which a picture does not have, is found by the fast Griffin-Lim algorithm
(Perraudin et al. 2013) from a fixed random phase: the same picture always gives the same sound.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from exact_resume.randomness import generator

RATE = 16_000  # samples a second
WINDOW = 1024  # samples; a window is 64 ms
HOP = 160  # samples from frame to frame, 10 ms
LOWEST = 40.0  # Hz; the highest frequency is half the rate
RANGE = 80.0  # dB below the loudest sine, which are -1 to 1 in a picture
ITERATIONS = 60
MOMENTUM = 0.99


def log_mel(sound: Tensor, bands: int) -> Tensor:
    """Return spectrograms ``(b, bands, frames)`` in [-1, 1]; the highest band is the first row.

    Args:
        sound: samples ``(b, frames * HOP)`` in [-1, 1].
        bands: number of bands.
    """
    mel = filters(bands).to(sound) @ _stft(sound).abs()
    decibels = 20 * torch.log10((mel / _full_scale()).clamp(min=1e-6))
    return (decibels / RANGE * 2 + 1).clamp(-1, 1).flip(1)


def to_sound(picture: Tensor) -> Tensor:
    """Return the sounds ``(b, frames * HOP)`` in [-1, 1] of spectrograms ``(b, bands, frames)``."""
    decibels = (picture.float().flip(1).clamp(-1, 1) - 1) / 2 * RANGE
    mel = torch.where(decibels > -RANGE, 10 ** (decibels / 20), 0) * _full_scale()
    inverse = torch.linalg.pinv(filters(picture.shape[1])).float()
    return griffin_lim((inverse @ mel).clamp(min=0))


def griffin_lim(magnitude: Tensor) -> Tensor:
    """Return sounds ``(b, frames * HOP)`` whose STFT is about ``magnitude`` ``(b, f, frames)``."""
    noise = torch.rand(magnitude.shape[1:], generator=generator("phase"))
    phase = torch.polar(torch.ones_like(noise), 2 * math.pi * noise).expand(magnitude.shape)
    last = torch.zeros_like(phase)
    for _ in range(ITERATIONS):
        projected = _stft(_istft(magnitude * phase))
        ahead = projected + MOMENTUM * (projected - last)
        phase = ahead / ahead.abs().clamp(min=1e-9)
        last = projected
    return _istft(magnitude * phase).clamp(-1, 1)


@lru_cache
def filters(bands: int) -> Tensor:
    """Return M, float64 ``(bands, WINDOW / 2 + 1)``; the centres are even in mel.

    Source: O'Shaughnessy 1987, mel = 2595 log10(1 + f / 700).
    """
    low, high = (2595 * math.log10(1 + hertz / 700) for hertz in (LOWEST, RATE / 2))
    mel = torch.linspace(low, high, bands + 2, dtype=torch.float64)
    corner = 700 * (10 ** (mel / 2595) - 1)
    frequency = torch.arange(WINDOW // 2 + 1, dtype=torch.float64) * RATE / WINDOW
    start, centre, end = corner[:-2, None], corner[1:-1, None], corner[2:, None]
    rising = (frequency - start) / (centre - start)
    falling = (end - frequency) / (end - centre)
    triangles = torch.minimum(rising, falling).clamp(min=0)
    return triangles / triangles.sum(1, keepdim=True).clamp(min=1e-9)


def _full_scale() -> float:
    """Return the magnitude of a sine of amplitude 1: half the sum of a Hann window."""
    return WINDOW / 4


def _stft(sound: Tensor) -> Tensor:
    """Return ``(b, WINDOW / 2 + 1, frames)``, a frame for each ``HOP`` samples."""
    window = torch.hann_window(WINDOW, dtype=sound.dtype)
    padded = F.pad(sound, (WINDOW // 2, WINDOW // 2 - HOP))  # the first frame is about sample 0
    return torch.stft(padded, WINDOW, HOP, window=window, center=False, return_complex=True)


def _istft(spectrum: Tensor) -> Tensor:
    window = torch.hann_window(WINDOW)
    length = spectrum.shape[2] * HOP
    return torch.istft(F.pad(spectrum, (0, 1)), WINDOW, HOP, window=window, length=length)
