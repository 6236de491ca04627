"""The model of ``benchmarks/goodput.py``: its closed form, its simulation, and their limits."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.goodput import SYSTEMS, System, goodput, parts, simulate

# Failures every 1000 s; saves at whole steps, so that the simulation and the formula mean the same.
SMALL = System(
    gpus=1,
    blocked=2.0,
    durable=5.0,
    start=30.0,
    noticed=((0.5, 10.0), (0.5, 50.0)),
    step=1.0,
    hours=1000 / 3600,
)


@pytest.mark.parametrize("repeats", [0.0, 2.0])
@pytest.mark.parametrize("interval", [10.0, 60.0, 400.0])
def test_the_simulation_agrees_with_the_closed_form(interval, repeats):
    system = replace(SMALL, repeats=repeats)
    part = parts(simulate(system, interval, lives=20_000))
    assert sum(part.values()) == pytest.approx(1)
    # Its own spread: a life varies as much as its mean.
    assert part["useful"] == pytest.approx(goodput(system, interval), rel=5 / np.sqrt(20_000))


def test_control_another_start_time_is_noticed():
    part = parts(simulate(replace(SMALL, start=80.0), 60.0, lives=20_000))
    assert part["useful"] != pytest.approx(goodput(SMALL, 60.0), rel=5 / np.sqrt(20_000))


def test_without_failures_only_saves_cost():
    never = replace(SMALL, hours=1e9)
    assert goodput(never, 60.0) == pytest.approx(60 / 62, rel=1e-6)


def test_rare_failures_cost_half_an_interval_the_delay_and_the_restart():
    """Young's first-order loss: what is left out is of second order."""
    rare = replace(SMALL, hours=100.0)
    mean = rare.between_failures
    lost = 2 / 62 + ((62 / 2 + 3) + 30 + 30) / mean  # saving; repeating, starting, noticing
    assert 1 - goodput(rare, 60.0) == pytest.approx(lost, rel=0.02)


def test_saves_that_queue_are_waited_for():
    """The disk takes 50 s for each: training waits, although its copy takes 2 s."""
    slow = replace(SMALL, durable=52.0, hours=1000.0)
    spent = simulate(slow, 10.0, lives=3)
    assert spent["saving"] / spent["useful"] == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: str(system.gpus))
def test_the_chosen_interval_is_the_best_that_saves_allow(system):
    best = system.best_interval
    for other in np.geomspace(max(system.durable, best / 30), min(3600, best * 30), 50):
        assert goodput(system, other) <= goodput(system, best) * (1 + 1e-6)
