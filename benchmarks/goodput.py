"""Compute how much of the time is useful training: python benchmarks/goodput.py

A run trains, saves, fails, is noticed, starts again, and repeats what was not durable. The closed
form and a simulation say how large the useful part is, for 8, 256 and 16,384 GPUs and any interval
between saves; docs/measurements/goodput.md has the result and docs/images/goodput.png the figure.
``benchmarks/restarting.py`` measures the times of a small real run.
"""

import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from exact_resume.checkpoint_interval import CEILING, optimal_interval

ROOT = Path(__file__).resolve().parents[1]
FIGURE = ROOT / "docs" / "images" / "goodput.png"
# Llama 3 (arXiv:2407.21783): 419 unexpected interruptions in 54 days on 16,384 GPUs.
GPU_HOURS_BETWEEN_FAILURES = 16_384 * 54 * 24 / 419
DEFAULT_INTERVAL = 600.0  # seconds, callbacks.checkpoint.every_n_minutes


@dataclass(frozen=True)
class System:
    """A run on a cluster; all times in seconds.

    Attributes:
        gpus: their number.
        blocked: time that training waits for a save.
        durable: time from the beginning of a save until it is durable.
        start: from the new processes to the end of their first step.
        noticed: from a failure to the new processes: pairs of (share of the failures, time).
        step: time of a training step; saves are made between steps.
        repeats: further starts that fail at once, on average, because the cause is still there.
        hours: GPU-hours between two failures.
    """

    gpus: int
    blocked: float
    durable: float
    start: float
    noticed: tuple[tuple[float, float], ...]
    step: float = 1.0
    repeats: float = 0.0
    hours: float = GPU_HOURS_BETWEEN_FAILURES

    @property
    def between_failures(self) -> float:
        """The mean time between two failures."""
        return 3600 * self.hours / self.gpus

    @property
    def dead(self) -> float:
        """The mean time from a failure to processes that stay."""
        noticed = sum(share * seconds for share, seconds in self.noticed)
        return noticed + self.repeats * (noticed + self.start)

    @property
    def best_interval(self) -> float:
        """What ``every=auto`` chooses."""
        best = optimal_interval(self.blocked, self.between_failures)
        return max(min(best, CEILING), self.durable)


# What a failure costs until the processes are started again, by the limits of this project: one
# that exits is noticed by the supervisor (one machine; the others get 10 s) or by torchrun, which
# then waits 30 s for more machines; a machine that is gone, by the keep-alive of its connections
# (60 s); a hang, by the watchdog (20 steps, at least 60 s). The shares are assumed.
ONE_MACHINE = ((0.75, 11.0), (0.25, 60.0))
SEVERAL_MACHINES = ((0.5, 5.0 + 30), (0.25, 60.0 + 30), (0.25, 100.0 + 30))
# Seconds of a start, assumed: imports, meeting, data, reading the checkpoint, the first step.
STARTS = {
    8: (10.0, 2.0, 5.0, 23.0, 20.0),
    256: (30.0, 5.0, 15.0, 70.0, 60.0),
    16_384: (60.0, 30.0, 30.0, 60.0, 120.0),
}
# 16 bytes a parameter: weights, average and two moments, in 32 bits. A GPU's part is copied to the
# host at 20 GB/s, and all of it is written at 1, 10 and 200 GB/s; the first by one process.
SYSTEMS = [
    System(8, 10.8 / 20, 10.8 / 20 + 10.8 / 1, sum(STARTS[8]), ONE_MACHINE, 0.5),
    System(256, 0.5, 0.5 + 128 / 10, sum(STARTS[256]), SEVERAL_MACHINES, 2.0),
    System(16_384, 0.5, 0.5 + 6480 / 200, sum(STARTS[16_384]), SEVERAL_MACHINES, 5.0),
]


def goodput(system: System, interval: float) -> float:
    """Return the useful part of the time, exactly, if saves do not queue.

    A life between two failures lasts M on average, by an exponential distribution. Its k-th save is
    durable at start + k (interval + blocked) + delay, and the number of durable saves is the sum of
    the probabilities that the life lasts so long.

    Args:
        system: the run.
        interval: seconds of training between two saves, so long that saves do not queue.
    """
    mean = system.between_failures
    cycle = interval + system.blocked
    delay = system.durable - system.blocked
    durable_saves = math.exp(-(system.start + delay) / mean) / math.expm1(cycle / mean)
    return interval * durable_saves / (mean + system.dead)


def simulate(system: System, interval: float, lives: int, seed: int = 0) -> Counter[str]:
    """Return what the time went into, in seconds, summed over ``lives`` lives.

    Unlike the closed form it saves between whole steps, notices each failure in one of several
    ways, and has one writer, so that a third save waits as in a run.
    """
    rng = np.random.default_rng(seed)
    shares = [share for share, _ in system.noticed]
    spent: Counter[str] = Counter()
    for _ in range(lives):
        _live(system, interval, rng.exponential(system.between_failures), spent)
        repeats = rng.poisson(system.repeats)
        spent["starting"] += repeats * system.start
        for kind in rng.choice(len(shares), size=1 + repeats, p=shares):
            spent["noticing"] += system.noticed[kind][1]
    return spent


def _live(system: System, interval: float, life: float, spent: Counter[str]) -> None:
    """Train from a start to the failure at ``life``, and add what the time went into."""
    training = math.ceil(round(interval / system.step, 9)) * system.step
    writing = system.durable - system.blocked
    now = system.start
    free = [0.0, 0.0]  # when the last two saves are durable: there are two buffers
    trained = saved = durable = 0.0
    while now + training <= life:
        now += training
        trained += training
        begin = max(now, free[0])  # a third save waits for the first
        end = min(begin + system.blocked, life)
        saved += end - now
        now = begin + system.blocked
        if now > life:
            break
        done = max(now, free[1]) + writing
        free = [free[1], done]
        if done <= life:
            durable += training
    else:
        trained += max(0.0, life - now)
    spent["starting"] += min(life, system.start)
    spent["saving"] += saved
    spent["useful"] += durable
    spent["repeating"] += trained - durable


def parts(spent: Counter[str]) -> dict[str, float]:
    """Return the parts of the time, which sum up to 1."""
    total = sum(spent.values())
    return {name: seconds / total for name, seconds in spent.items()}


def print_sizes() -> None:
    """Print the useful part at the interval of ``every=auto``, and where the rest goes."""
    print("| GPUs | a failure every | interval | useful | at 10 min | at 60 min |", end="")
    print(" saving | repeating | noticing | starting | simulated |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for system in SYSTEMS:
        interval = system.best_interval
        spent = simulate(system, interval, lives=200 if system.gpus < 100 else 2000)
        part = parts(spent)
        columns = [
            f"{system.gpus:,}",
            f"{system.between_failures / 3600:,.1f} h",
            f"{interval / 60:.1f} min",
            f"{goodput(system, interval):.2%}",
            f"{goodput(system, DEFAULT_INTERVAL):.2%}",
            f"{goodput(system, 3600.0):.2%}",
            *(f"{part[name]:.2%}" for name in ("saving", "repeating", "noticing", "starting")),
            f"{part['useful']:.2%}",
        ]
        print(f"| {' | '.join(columns)} |")


def print_mends() -> None:
    """Print what changes at 16,384 GPUs when one time changes."""
    base = SYSTEMS[-1]
    exited = ((1.0, 5.0),)
    cases = {
        "as above": base,
        "a start takes 1 min": replace(base, start=60.0),
        "a start takes 10 min": replace(base, start=600.0),
        "a start takes 30 min": replace(base, start=1800.0),
        "every failure is noticed in 5 s, and no waiting for machines": replace(
            base, noticed=exited
        ),
        "a hang is noticed only after 30 min": replace(
            base, noticed=((0.5, 35.0), (0.25, 90.0), (0.25, 1830.0))
        ),
        "the cause is still there at every second start": replace(base, repeats=1.0),
        "the cause is still there, three times on average": replace(base, repeats=3.0),
        "failures come twice as often": replace(base, hours=base.hours / 2),
        "9,600 GPUs": replace(base, gpus=9600),
        "256 GPUs": SYSTEMS[1],
        "256 GPUs, and one process writes the checkpoint": replace(
            SYSTEMS[1], blocked=128 / 20, durable=128 / 20 + 128 / 1
        ),
    }
    print("\n| 16,384 GPUs | interval | useful | lost from one failure to the next |")
    print("|---|---|---|---|")
    for name, system in cases.items():
        interval = system.best_interval
        useful = goodput(system, interval)
        lost = (1 - useful) * (system.between_failures + system.dead) / 60
        print(f"| {name} | {interval / 60:.1f} min | {useful:.1%} | {lost:.1f} min |")


def draw() -> None:
    """Draw the useful part against the interval, for all sizes; dots are simulated."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for system, colour in zip(SYSTEMS, ("tab:green", "tab:blue", "tab:red"), strict=True):
        intervals = np.geomspace(system.durable, 36_000, 200)
        lost = [1 - goodput(system, interval) for interval in intervals]
        axes.plot(intervals, lost, color=colour, label=f"{system.gpus:,} GPUs")
        for interval in np.geomspace(max(system.durable, 60.0), 36_000, 6):
            saves = system.between_failures / interval  # of a life
            useful = parts(simulate(system, interval, lives=int(min(2000, 20 + 4e5 / saves))))
            axes.plot(interval, 1 - useful["useful"], ".", color=colour)
        best = system.best_interval
        axes.plot(best, 1 - goodput(system, best), "o", color=colour, fillstyle="none", ms=9)
    axes.axvline(DEFAULT_INTERVAL, color="gray", lw=0.8, ls=":")
    axes.set(xscale="log", yscale="log", xlabel="time between two saves", ylabel="useful part")
    axes.set_xticks([10, 60, 600, 3600, 36_000], ["10 s", "1 min", "10 min", "1 h", "10 h"])
    axes.set_yticks([0.5, 0.1, 0.01, 1e-3, 1e-4], ["50 %", "90 %", "99 %", "99.9 %", "99.99 %"])
    axes.minorticks_off()
    axes.invert_yaxis()
    axes.legend(loc="lower left")
    axes.grid(alpha=0.3)
    figure.savefig(FIGURE, dpi=110)


def main() -> None:
    """Print the tables, and draw the figure."""
    print_sizes()
    print_mends()
    draw()


if __name__ == "__main__":
    main()
