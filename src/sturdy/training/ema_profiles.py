"""Power-function averages of the weights, and any of them from stored snapshots of a few (EDM2:
Karras et al. 2024).

    average(t) = integral over tau of p(tau) weights(tau),    p(tau) = (gamma + 1) tau^gamma /
    t^(gamma + 1) on [0, t]

A profile's length is its standard deviation over t. The profile that is wanted is fitted, by least
squares, by those of the snapshots; the same combination of the snapshots is the average (appendix
C).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FLATTEST = 12**-0.5  # the uniform average, gamma = 0


class Profile(NamedTuple):
    """Of an average after ``step`` updates."""

    gamma: float
    step: int


class Fit(NamedTuple):
    """What to multiply the given profiles by, ``(n,)``, and how far off their sum then is: |p -
    sum| / |p|.
    """

    coefficients: NDArray[np.float64]
    error: float


def gamma(std: float) -> float:
    """The exponent of the profile of length ``std``, by bisection of ``length``, which falls.

    Raises:
        ValueError: if there is none.
    """
    if not 0 < std <= FLATTEST:
        raise ValueError(
            f"an EMA of length {std}: it must be above 0, and at most {FLATTEST:.4f}, the uniform "
            f"average"
        )
    low, high = 0.0, 1 / std
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if length(middle) > std else (low, middle)
    return low


def length(gamma: float) -> float:
    """The standard deviation of the profile, in units of the training so far (eq. 123)."""
    return ((gamma + 1) / (gamma + 3)) ** 0.5 / (gamma + 2)


def beta(gamma: float, step: int) -> float:
    """What update number ``step``, from 1 on, leaves of the average (eq. 127); it makes the
    profile's bins exactly.
    """
    return (1 - 1 / step) ** (gamma + 1)


def profile_dot(a: Profile, b: Profile) -> float:
    """The integral of the product of two profiles (eq. 151)."""
    first, last = sorted((a.step, b.step))
    overlap = (first / a.step) ** a.gamma * (first / b.step) ** b.gamma
    return (a.gamma + 1) * (b.gamma + 1) / (a.gamma + b.gamma + 1) * overlap / last


def fit(profiles: Sequence[Profile], wanted: Profile) -> Fit:
    """``wanted`` as a sum of ``profiles`` with coefficients that sum to 1, by least squares
    (algorithm 3).
    """
    if wanted in profiles:
        return Fit(
            np.array([float(i == profiles.index(wanted)) for i in range(len(profiles))]), 0.0
        )
    unit = np.array(
        [profile_dot(p, p) ** -0.5 for p in profiles]
    )  # scaled to norm 1, for the sake of precision
    gram = np.array([[profile_dot(p, q) for q in profiles] for p in profiles]) * np.outer(
        unit, unit
    )
    right = np.array([profile_dot(p, wanted) for p in profiles]) * unit
    scaled = np.linalg.lstsq(gram, right, rcond=1e-12)[0]
    scaled /= scaled @ unit  # each profile integrates to 1, and so has their sum to
    squared = 1 + (scaled @ gram @ scaled - 2 * scaled @ right) / profile_dot(wanted, wanted)
    return Fit(scaled * unit, float(max(0.0, squared) ** 0.5))
