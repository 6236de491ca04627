"""Profiles of power-function averages, and how to combine stored averages into another one.

    average(t) = integral over tau of p(tau) weights(tau)
    p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1) on [0, t]

A profile's length is its standard deviation over t. The profiles of stored averages are fitted to
another profile by least squares; the same combination of the averages is the average with that
profile. Source: EDM2 (Karras et al. 2024), appendix C.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FLATTEST = 12**-0.5  # the uniform average, gamma = 0


class Profile(NamedTuple):
    """The profile of an average with exponent ``gamma`` after ``step`` updates."""

    gamma: float
    step: int


class Fit(NamedTuple):
    """A profile as a combination of others.

    Attributes:
        coefficients: of the other profiles, ``(n,)``.
        error: |p - combination| / |p|.
    """

    coefficients: NDArray[np.float64]
    error: float


def gamma(std: float) -> float:
    """Return the exponent of the profile of length ``std``, by bisection of ``length``.

    Raises:
        ValueError: no profile has that length.
    """
    if not 0 < std <= FLATTEST:
        raise ValueError(
            f"an EMA of length {std}: it must be above 0, and at most {FLATTEST:.4f}, the uniform "
            f"average"
        )
    low = 0.0
    high = 1 / std
    for _ in range(100):
        middle = (low + high) / 2
        if length(middle) > std:  # the length falls with gamma
            low = middle
        else:
            high = middle
    return low


def length(gamma: float) -> float:
    """Return the profile's standard deviation, in units of the training so far (eq. 123)."""
    return ((gamma + 1) / (gamma + 3)) ** 0.5 / (gamma + 2)


def beta(gamma: float, step: int) -> float:
    """Return the factor of the old average in update number ``step``, from 1 on (eq. 127).

    It makes the bins of the profile exact.
    """
    return (1 - 1 / step) ** (gamma + 1)


def profile_dot(a: Profile, b: Profile) -> float:
    """Return the integral of the product of two profiles (eq. 151)."""
    first, last = sorted((a.step, b.step))
    overlap = (first / a.step) ** a.gamma * (first / b.step) ** b.gamma
    return (a.gamma + 1) * (b.gamma + 1) / (a.gamma + b.gamma + 1) * overlap / last


def fit(profiles: Sequence[Profile], target: Profile) -> Fit:
    """Fit a combination of ``profiles`` to ``target``, by least squares (algorithm 3).

    The coefficients sum to 1.
    """
    if target in profiles:
        exact = np.zeros(len(profiles))
        exact[profiles.index(target)] = 1.0
        return Fit(exact, 0.0)
    unit = np.array([profile_dot(p, p) ** -0.5 for p in profiles])  # to norm 1, for precision
    products = np.array([[profile_dot(p, q) for q in profiles] for p in profiles])
    gram = products * np.outer(unit, unit)
    right = np.array([profile_dot(p, target) for p in profiles]) * unit
    scaled = np.linalg.lstsq(gram, right, rcond=1e-12)[0]
    scaled /= scaled @ unit  # each profile integrates to 1, and so must their combination
    squared = 1 + (scaled @ gram @ scaled - 2 * scaled @ right) / profile_dot(target, target)
    return Fit(scaled * unit, float(max(0.0, squared) ** 0.5))
