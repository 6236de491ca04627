"""Spacings against published numbers, a second library, and each other under another schedule."""

from itertools import pairwise

import pytest
import torch
from gaussian import SCHEDULES

from sturdy.diffusion import Cosine, Euler, Heun, VarianceExploding
from sturdy.diffusion.editing import TruncatedSchedule
from sturdy.diffusion.spacing import SPACINGS, karras, log_snr, time


def ratios(spacing, schedule, steps):
    alpha, sigma = schedule(torch.tensor(spacing(schedule, steps, 1.0), dtype=torch.float64))
    return (sigma / alpha).tolist()


def test_edm_steps_of_the_paper():
    expected = [80, 17.527832, 2.515219, 0.16975276, 0.002, 0]
    assert ratios(karras, VarianceExploding(), 5) == pytest.approx(expected, rel=1e-6, abs=1e-15)


@pytest.mark.parametrize(("spacing", "theirs"), [(karras, "karras"), (log_snr, "exponential")])
@pytest.mark.parametrize("steps", [1, 2, 10, 33])
def test_edm_steps_equal_diffusers(spacing, theirs, steps):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.EDMDPMSolverMultistepScheduler(sigma_schedule=theirs)
    scheduler.set_timesteps(steps)
    expected = scheduler.sigmas.tolist()
    if theirs == "exponential" and steps == 1:
        expected = [80, 0]  # theirs starts a walk of one step at sigma_min
    assert ratios(spacing, VarianceExploding(), steps) == pytest.approx(
        expected, rel=1e-5, abs=1e-12
    )


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("spacing", SPACINGS.values(), ids=SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 3, 100])
def test_times_fall_from_1_to_0(spacing, schedule, steps):
    for end in (1, 0.3, 0.001):
        times = spacing(TruncatedSchedule(schedule, end), steps, 1.0)
        assert len(times) == steps + 1
        assert times[0] == 1
        assert times[-1] == 0
        assert all(a > b for a, b in pairwise(times))


@pytest.mark.parametrize("spacing", [karras, log_snr])
@pytest.mark.parametrize(
    "name", sorted(set(SCHEDULES) - {"scaled_linear"})
)  # whose noise never is 80 times the picture
def test_noise_levels_are_the_same_under_every_schedule(spacing, name):
    expected = ratios(spacing, VarianceExploding(), 12)[1:]
    assert ratios(spacing, SCHEDULES[name], 12)[1:] == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert ratios(time, SCHEDULES[name], 12)[1] != pytest.approx(expected[0], rel=0.01)


def test_powers_of_time():
    assert time(Cosine(), 4, 1.0) == [1, 0.75, 0.5, 0.25, 0]
    assert time(Cosine(), 4, 2.0) == [1, 0.5625, 0.25, 0.0625, 0]


def test_an_unknown_spacing_is_refused():
    with pytest.raises(ValueError, match=r"spacing=even is none of time, karras, log_snr"):
        Euler(10, spacing="even")
    Heun(10, spacing="log_snr")
