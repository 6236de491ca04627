"""Choose how the CPU threads of a step wait for each other: spinning or asleep.

The threads meet after every loop of every layer. A thread that arrives first can spin, which is
fastest while each thread has a CPU to itself. If other programs need the CPUs, too, a spinning
thread may take the CPU of the thread that it waits for, and steps take ten times as long. Asleep,
steps then take only three times as long, but a third longer on a quiet machine. So both ways are
tried, and threads spin unless sleeping is clearly faster. The bits of the run are the same: each
thread computes the same numbers.

GNU's OpenMP, which comes with torch on Linux, reads its settings only once. But it lets threads
sleep while there are more OpenMP threads than CPUs (its manual, at ``GOMP_SPINCOUNT``). A second
team of threads, which is idle, makes them that many.
"""

import ctypes
import logging
import math
import os
import threading
import time
from collections import deque
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from exact_resume import distributed

log = logging.getLogger(__name__)

POLICIES = ("auto", "spin", "sleep")
# Environment variables with which the user has chosen already.
USER_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")

Phase = Literal["use", "try", "confirm"]


class PolicyChooser:
    """Finds the faster of two ways to wait, from the seconds that each step takes.

    Steps wait in the way that is used. At times the other way is tried for ``n`` steps. If it is
    faster, the used way is measured once more, for ``n`` steps, and the way is changed if that
    confirms it. A trial ends as soon as its result is certain::

        use  --(a trial is due)-->  try  --(faster)-->  confirm  --(slower)-->  use the other way

    Steps spin unless sleeping is faster by the factor ``gain``. On a quiet machine both ways take
    about as long, and noise must not choose sleep; on a busy one sleeping is much faster. Steps
    sleep at first, as that never costs much.

    Args:
        n: steps of a trial, and steps that are compared with it.
        skip: number of first steps that are not counted.
        gain: above 1; sleeping must be faster by this factor.
        change: above 1; a trial is due when spinning has become slower, or sleeping faster, by it.
        soonest: seconds between two trials, at least.
        often: seconds to the next trial after the way was changed. The pause doubles with each
            trial that changes nothing.
        seldom: seconds between two trials, at most.

    Attributes:
        used: whether steps wait asleep, except in a trial.
        decided: whether the last observed step has ended a trial.
        seconds: of a step in the last trial, by whether it was asleep.
    """

    def __init__(
        self,
        *,
        n: int = 5,
        skip: int = 8,
        gain: float = 1.15,
        change: float = 1.5,
        soonest: float = 10,
        often: float = 60,
        seldom: float = 600,
    ) -> None:
        self.n = n
        self.skip = skip
        self.gain = gain
        self.change = change
        self.soonest = soonest
        self.often = often
        self.seldom = seldom
        self.used = True
        self.decided = False
        self.seconds = {False: 0.0, True: 0.0}
        self.phase: Phase = "use"
        self.recent: deque[float] = deque(maxlen=n)  # seconds of steps in the used way
        self.tried: list[float] = []  # seconds of steps in the other way
        self.confirmed: list[float] = []  # seconds of steps in the used way, after the trial
        self.pause = often  # seconds from the last trial to the next
        self.since_trial = 0.0  # seconds
        self.after_trial = 0.0  # seconds of ``n`` steps in the used way, right after the last trial

    @property
    def asleep(self) -> bool:
        """Whether the next step must wait asleep."""
        return not self.used if self.phase == "try" else self.used

    def observe(self, seconds: float) -> None:
        """Take the time of a step that waited as ``asleep`` said, and decide on the next step."""
        self.decided = False
        if self.skip:
            self.skip -= 1
        elif self.phase == "use":
            self._use(seconds)
        elif self.phase == "try":
            self._try(seconds)
        else:
            self._confirm(seconds)

    def limit(self) -> float:
        """Return after how many seconds the next step decides the trial; infinity if it cannot."""
        # The other way is taken if its time is below that of the used way times this factor.
        factor = self.gain if self.used else 1 / self.gain
        if self.phase == "try":
            return sum(self.recent) * factor - sum(self.tried)
        if self.phase == "confirm":
            return sum(self.tried) / factor - sum(self.confirmed)
        return math.inf

    def _use(self, seconds: float) -> None:
        self.recent.append(seconds)
        self.since_trial += seconds
        if len(self.recent) == self.n and self._is_trial_due():
            self.tried = []
            self.confirmed = []
            self.phase = "try"

    def _is_trial_due(self) -> bool:
        if not self.after_trial or self.since_trial > self.pause:
            return True
        now = sum(self.recent)
        if self.used:
            has_changed = now * self.change < self.after_trial
        else:
            has_changed = now > self.after_trial * self.change
        return has_changed and self.since_trial > self.soonest

    def _try(self, seconds: float) -> None:
        is_slower = seconds > self.limit()
        self.tried.append(seconds)
        if is_slower:
            self._end_trial(change=False)
        elif len(self.tried) == self.n:
            self.phase = "confirm"

    def _confirm(self, seconds: float) -> None:
        is_slower = seconds > self.limit()
        self.confirmed.append(seconds)
        if is_slower or len(self.confirmed) == self.n:
            self._end_trial(change=is_slower)

    def _end_trial(self, *, change: bool) -> None:
        self.seconds = {
            self.used: mean(self.confirmed or self.recent),
            not self.used: mean(self.tried),
        }
        if change:
            self.recent = deque(self.tried, maxlen=self.n)
            self.pause = self.often
            self.used = not self.used
        else:
            self.recent = deque(self.confirmed or self.recent, maxlen=self.n)
            self.pause = min(2 * self.pause, self.seldom)
        self.phase = "use"
        self.since_trial = 0.0
        self.after_trial = sum(self.recent)
        self.decided = True


class IdleTeam:
    """Idle threads of GNU's OpenMP, so many that all of its threads wait asleep until ``close``.

    Args:
        library: the OpenMP library that torch computes with.
        threads: number of threads that compute.
    """

    def __init__(self, library: ctypes.CDLL, threads: int) -> None:
        self.library = library
        self.size = max(2, library.omp_get_num_procs() - threads + 2)
        self.started = threading.Event()
        self.end = threading.Event()
        self.owner = threading.Thread(target=self._hold_team, daemon=True, name="idle-openmp")
        self.owner.start()
        self.started.wait()

    def close(self) -> None:
        """End the threads."""
        self.end.set()
        self.owner.join()

    def _hold_team(self) -> None:
        # Each thread of the team calls free(NULL), which does nothing.
        nothing = ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p)
        self.library.GOMP_parallel(nothing, None, ctypes.c_uint(self.size), ctypes.c_uint(0))
        self.started.set()
        self.end.wait()  # OpenMP keeps the team for as long as its first thread lives


def gnu_openmp() -> ctypes.CDLL | None:
    """Return the GNU OpenMP library that torch has loaded; None if it uses another one, or none."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return None
    lines = [line for line in maps.read_text().splitlines() if "/libgomp" in line]
    loaded = {line.split(maxsplit=5)[-1] for line in lines}
    if not loaded:
        return None
    home = str(Path(torch.__file__).parent.parent)
    of_torch = [path for path in loaded if path.startswith(home)]
    return ctypes.CDLL(min(of_torch or loaded))


class ThreadWaiting(Callback):
    """Lets the threads of a step wait in the way that is faster at present.

    It does so on a CPU and with more than one thread. Rank 0 decides for all processes, since the
    slowest process determines the time of a step.

    Args:
        policy: ``auto``, ``spin`` as OpenMP does by itself, or ``sleep``.
    """

    def __init__(self, *, policy: str = "auto") -> None:
        if policy not in POLICIES:
            raise ValueError(f"policy={policy} must be one of {', '.join(POLICIES)}")
        self.policy = policy
        self.chooser = PolicyChooser()
        self.library: ctypes.CDLL | None = None
        self.team: IdleTeam | None = None
        self.timer: threading.Timer | None = None
        self.is_auto = False
        self.step_start = 0.0
        self.logged = False  # whether the log said last that threads sleep

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        applies = trainer.strategy.root_device.type == "cpu" and torch.get_num_threads() > 1
        if applies and not any(name in os.environ for name in USER_SETTINGS):
            self.library = gnu_openmp()
        else:
            self.library = None
        if self.policy == "auto":
            self.is_auto = bool(distributed.all_reduce_max(self.library is not None))
        self._wait(asleep=self.policy == "sleep")

    @override
    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if not self.is_auto:
            return
        decision = self.chooser.asleep and trainer.is_global_zero
        self._wait(asleep=bool(distributed.all_reduce_max(decision)))
        limit = self.chooser.limit()
        if not self.team and limit < math.inf:
            # A step that spins may take minutes: it sleeps once the trial is lost.
            self.timer = threading.Timer(limit, self._wait, kwargs={"asleep": True})
            self.timer.start()
        self.step_start = time.monotonic()

    @override
    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if not self.is_auto:
            return
        seconds = time.monotonic() - self.step_start
        self._stop_timer()
        self.chooser.observe(seconds)
        if trainer.is_global_zero and self.chooser.decided:
            self._log_change()

    @override
    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._close()

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._close()

    def _log_change(self) -> None:
        asleep = self.chooser.used
        if asleep == self.logged:
            return
        self.logged = asleep
        if asleep:
            how = "asleep, as other programs use the CPUs, too"
        else:
            how = "spinning, as the CPUs are free again"
        now = self.chooser.seconds[asleep]
        other = self.chooser.seconds[not asleep]
        log.info(f"threads wait for each other {how}: {now:.2g} s a step instead of {other:.2g} s")

    def _close(self) -> None:
        self._stop_timer()
        self._wait(asleep=False)

    def _stop_timer(self) -> None:
        if self.timer:
            self.timer.cancel()
            self.timer.join()
            self.timer = None

    def _wait(self, *, asleep: bool) -> None:
        """Let threads wait asleep, or spinning, from now on."""
        if asleep and self.library and not self.team:
            self.team = IdleTeam(self.library, torch.get_num_threads())
        elif not asleep and self.team:
            self.team.close()
            self.team = None
