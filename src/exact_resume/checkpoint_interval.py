"""How often to save so that the least time is lost, from the measured cost of a save.

A save blocks training for c seconds, and is durable D seconds later. A failure comes every M
seconds on average, at any time, and loses everything since the last durable save. With T seconds of
training between two saves, the lost part of the time is about

    c / T + (T / 2 + D + restart) / M,    which is least at    T = sqrt(2 c M)      Young (1974)

D and the restart do not depend on T, so they do not move the optimum. D only bounds it from below:
no save begins before the last one is durable. If failures are a Poisson process, the useful part is
exactly

    T exp(-(D + restart) / M) / (M (exp((T + c) / M) - 1)),

Daly's model (2006) with D as a part of the restart, so that his equation 37 gives its maximum.
"""

import json
import logging
import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median

import torch

from exact_resume.files import atomic_write

SAVE_COST = "save_cost.json"  # in the directory of a run
CEILING = 3600.0  # seconds; a run is saved every hour, however rare failures are
FIRST = 60.0  # seconds until the first save of a run, whose cost is not known yet
LAST_SAVES = 5  # saves that the cost is taken from
SAY_AGAIN = 2.0  # a change of the interval by this factor is worth another line

log = logging.getLogger(__name__)


def optimal_interval(blocked: float, mean_time: float) -> float:
    """Return the best time between two saves, by equation 37 of Daly (2006).

    Args:
        blocked: time that training waits for a save, above 0.
        mean_time: mean time between two failures, in the same unit.
    """
    ratio = blocked / (2 * mean_time)
    if ratio >= 1:
        return mean_time
    young = math.sqrt(2 * blocked * mean_time)
    return young * (1 + math.sqrt(ratio) / 3 + ratio / 9) - blocked


class SaveInterval:
    """The time between two saves, from what the last saves cost.

    Only rank 0 measures and decides. Until a cost is known, the first save comes soon.

    Args:
        mean_time_between_failures: hours between two failures of the run.

    Attributes:
        file: where the cost is kept for the next attempt; None for nowhere.
    """

    def __init__(self, mean_time_between_failures: float) -> None:
        is_number = isinstance(mean_time_between_failures, int | float)
        if not (is_number and 0 < mean_time_between_failures < math.inf):
            raise ValueError(
                f"mean_time_between_failures={mean_time_between_failures} must be a number of "
                f"hours above 0"
            )
        self.hours = float(mean_time_between_failures)
        self.file: Path | None = None
        self.earlier: tuple[float, float] | None = None  # the cost that an earlier attempt measured
        self.blocked: list[float] = []  # seconds that training waited for each of the last saves
        self.durable: list[float] = []  # seconds until each of them was durable
        self.begun: deque[float] = deque()  # when the saves began that are not durable yet
        self.said = 0.0  # the interval in the last line of the log, in seconds

    def cost(self) -> tuple[float, float] | None:
        """Return how many seconds a save blocks training and takes to be durable, if known."""
        if self.blocked and self.durable:
            return median(self.blocked), median(self.durable)
        return self.earlier

    def seconds(self) -> float:
        """Return the time between the end of a save and the beginning of the next."""
        mean_time = 3600 * self.hours
        cost = self.cost()
        if cost is None:
            return min(FIRST, mean_time / 100)
        blocked, durable = cost
        return max(min(optimal_interval(blocked, mean_time), CEILING), durable)

    def is_due(self, elapsed: float) -> bool:
        """Return whether to save ``elapsed`` seconds after the last save; log a new interval."""
        seconds = self.seconds()
        if self.cost() and not 1 / SAY_AGAIN < seconds / (self.said or math.inf) < SAY_AGAIN:
            self.said = seconds
            log.info(self.describe())
        in_work = bool(self.begun) and elapsed < CEILING
        return elapsed >= seconds and not in_work

    def describe(self) -> str:
        """Return the interval and its reasons in one line; the cost must be known."""
        blocked, durable = (_format_time(seconds) for seconds in self.cost() or (0.0, 0.0))
        return (
            f"saves every {_format_time(self.seconds())}: a save costs {blocked} and is durable "
            f"after {durable}, and a failure is expected every {self.hours:g} h (auto)"
        )

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Measure how long training waits for the save that is made inside."""
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()  # the steps that are still being computed are no cost of it
        begin = time.monotonic()
        self.begun.append(begin)
        yield
        self.blocked = [*self.blocked, time.monotonic() - begin][-LAST_SAVES:]

    def note_durable(self) -> None:
        """Note that the oldest save in work is durable; the writer's thread calls it."""
        if not self.begun:
            return
        seconds = time.monotonic() - self.begun.popleft()
        self.durable = [*self.durable, seconds][-LAST_SAVES:]
        self.write()

    def read(self, file: Path) -> None:
        """Keep the cost in ``file`` from now on, and begin with the one that is there."""
        self.file = file
        self.earlier = None
        with suppress(OSError, ValueError, LookupError, TypeError):
            stored = json.loads(file.read_bytes())
            blocked, durable = float(stored["blocked"]), float(stored["durable"])
            if 0 < blocked < math.inf and 0 <= durable < math.inf:
                self.earlier = blocked, durable

    def write(self) -> None:
        """Keep the cost for the next attempt, which measures it again if it is lost."""
        cost = self.cost()
        if self.file is None or cost is None:
            return
        entries = {"blocked": cost[0], "durable": cost[1], "mean_time_between_failures": self.hours}
        with suppress(OSError), atomic_write(self.file, durable=False) as file:
            file.write(json.dumps(entries).encode())


def describe_stored_interval(file: Path) -> str:
    """Return the interval that follows from the cost in ``file``; '' if there is none."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        interval = SaveInterval(json.loads(file.read_bytes())["mean_time_between_failures"])
        interval.read(file)
        if interval.cost():
            return interval.describe()
    return ""


def _format_time(seconds: float) -> str:
    if seconds < 0.1:
        return f"{1000 * seconds:.1f} ms"
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"
