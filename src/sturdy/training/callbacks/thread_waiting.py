"""How the CPU threads of a step wait for each other: spinning, or asleep.

The threads meet after every loop of every layer. A thread that comes first spins, which is fastest
while each has a CPU to itself. Where other programs want the CPUs, too, it spins on the one that
the thread it waits for should get, and steps take ten times as long. Asleep they take three times
as long then, but also a third longer on a quiet machine. So both ways are tried; threads spin
unless sleeping is clearly faster. The bits are the same: who computes what does not change.

GNU's OpenMP, which torch brings along on Linux, reads its settings only once. But it lets threads
sleep while there are more OpenMP threads than CPUs (its manual, at ``GOMP_SPINCOUNT``). A second
team, which does nothing, makes them that many.
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
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from exact_resume import distributed

log = logging.getLogger(__name__)

POLICIES = ("auto", "spin", "sleep")
OWN = (
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
)  # environment variables with which somebody has chosen already


class PolicyChooser:
    """Find the faster of two ways to wait, from the seconds that each step took.

    The other way is tried for ``n`` steps: at the beginning, when spinning has become slower or
        sleeping faster by
    ``change``, and now and then. Steps spin unless sleeping is faster by ``gain``. On a quiet
    machine the ways differ little, and noise must not choose sleep. On a busy machine sleeping is
    faster by much more. A change is made if the old way, tried once more, says the same. Steps
    sleep at first, as that is never bad by much.

    Args:
        n: steps of a trial, and steps that are compared with it.
        skip: first steps that are not counted.
        gain, change: factors above 1. The first is what sleeping has to be faster by.
        soonest, often, seldom: seconds between two trials: at least, after a change of way, and at
            most. The pause doubles with each trial that changes nothing.

    Attributes:
        used: whether steps wait asleep, but for a trial.
        decided: whether the last observed step has ended a trial.
        seconds: of a step, spinning and asleep, in the last trial.
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
        self.n, self.skip, self.gain, self.change = n, skip, gain, change
        self.soonest, self.often, self.seldom = soonest, often, seldom
        self.used, self.decided = True, False
        self.seconds = {False: 0.0, True: 0.0}
        self.usual: deque[float] = deque(maxlen=n)  # steps of the way that is used
        self.other: list[float] = []  # steps of the way that is tried
        self.again: list[float] = []  # steps of the way that is used, beside those
        self.phase = self._use
        self.pause, self.since, self.reference = often, 0.0, 0.0

    @property
    def asleep(self) -> bool:
        """Whether the next step shall wait asleep."""
        return self.used != (self.phase == self._try)

    def observe(self, seconds: float) -> None:
        """Take in the time of a step, which has waited as ``asleep`` says, and decide on the
        next.
        """
        self.decided = False
        if self.skip:
            self.skip -= 1
            return
        self.phase(seconds)

    def limit(self) -> float:
        """Compute in how many seconds of the step to come the trial is decided; infinity where none
        is made.
        """
        allowed = (
            self.gain if self.used else 1 / self.gain
        )  # times the usual, for the other way to be taken
        if self.phase == self._try:
            return sum(self.usual) * allowed - sum(self.other)
        return (
            sum(self.other) / allowed - sum(self.again) if self.phase == self._confirm else math.inf
        )

    def _use(self, seconds: float) -> None:
        self.usual.append(seconds)
        self.since += seconds
        if len(self.usual) == self.n and self._due():
            self.other, self.again, self.phase = [], [], self._try

    def _due(self) -> bool:
        now = sum(self.usual)
        moved = (
            now * self.change < self.reference if self.used else now > self.reference * self.change
        )
        return (
            not self.reference or self.since > self.pause or (moved and self.since > self.soonest)
        )

    def _try(self, seconds: float) -> None:
        lost = seconds > self.limit()
        self.other.append(seconds)
        if lost:
            self._decide(changed=False)
        elif len(self.other) == self.n:
            self.phase = self._confirm

    def _confirm(self, seconds: float) -> None:
        won = seconds > self.limit()
        self.again.append(seconds)
        if won or len(self.again) == self.n:
            self._decide(changed=won)

    def _decide(self, *, changed: bool) -> None:
        self.seconds = {self.used: mean(self.again or self.usual), not self.used: mean(self.other)}
        if changed or self.again:
            self.usual = deque(self.other if changed else self.again, maxlen=self.n)
        self.pause = self.often if changed else min(2 * self.pause, self.seldom)
        self.used ^= changed
        self.phase, self.since, self.reference, self.decided = self._use, 0.0, sum(self.usual), True


class IdleTeam:
    """Threads of GNU's OpenMP that do nothing, so many that all of its threads wait asleep until
    ``close``.

    Args:
        library: the one that torch computes with.
        threads: that compute.
    """

    def __init__(self, library: ctypes.CDLL, threads: int) -> None:
        self.library, self.size = library, max(2, library.omp_get_num_procs() - threads + 2)
        self.there, self.end = threading.Event(), threading.Event()
        self.owner = threading.Thread(target=self._own, daemon=True, name="idle-openmp")
        self.owner.start()
        self.there.wait()

    def close(self) -> None:
        """End the threads."""
        self.end.set()
        self.owner.join()

    def _own(self) -> None:
        nothing = ctypes.cast(
            ctypes.CDLL(None).free, ctypes.c_void_p
        )  # each thread calls free(NULL)
        self.library.GOMP_parallel(nothing, None, ctypes.c_uint(self.size), ctypes.c_uint(0))
        self.there.set()
        self.end.wait()  # the team is there for as long as its first thread


def gnu_openmp() -> ctypes.CDLL | None:
    """Find the GNU OpenMP library that torch has loaded; None where it has another one, or none."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return None
    loaded = {
        line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines() if "/libgomp" in line
    }
    home = str(Path(torch.__file__).parent.parent)
    return ctypes.CDLL(min(loaded, key=lambda path: not path.startswith(home))) if loaded else None


class ThreadWaiting(Callback):
    """Lets the threads of a step wait in the way that is faster at present; on a CPU, and with more
    than one thread.

    Rank 0 decides for all processes: the slowest one makes the step.

    Args:
        policy: ``auto``, ``spin`` as OpenMP does by itself, or ``sleep``.
    """

    def __init__(self, *, policy: str = "auto") -> None:
        if policy not in POLICIES:
            raise ValueError(
                f"callbacks.waiting.policy={policy} must be one of {', '.join(POLICIES)}"
            )
        self.policy = policy
        self.chooser = PolicyChooser()
        self.library: ctypes.CDLL | None = None
        self.team: IdleTeam | None = None
        self.timer: threading.Timer | None = None
        self.auto, self.begun, self.told = False, 0.0, False  # what was told last: spinning

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        applies = trainer.strategy.root_device.type == "cpu" and torch.get_num_threads() > 1
        self.library = (
            gnu_openmp() if applies and not any(name in os.environ for name in OWN) else None
        )
        self.auto = self.policy == "auto" and bool(
            distributed.all_reduce_max(self.library is not None)
        )
        self._wait(asleep=self.policy == "sleep")

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if not self.auto:
            return
        self._wait(
            asleep=bool(distributed.all_reduce_max(self.chooser.asleep and trainer.is_global_zero))
        )
        if (
            not self.team and (limit := self.chooser.limit()) < math.inf
        ):  # a step that spins may take minutes
            self.timer = threading.Timer(limit, self._wait, kwargs={"asleep": True})
            self.timer.start()
        self.begun = time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if not self.auto:
            return
        seconds = time.monotonic() - self.begun
        self._stop_timer()
        self.chooser.observe(seconds)
        if self.chooser.decided and self.chooser.used != self.told and trainer.is_global_zero:
            self.told = asleep = self.chooser.used
            how = (
                "asleep, as other programs use the CPUs, too"
                if asleep
                else "spinning, as the CPUs are free again"
            )
            now, else_ = self.chooser.seconds[asleep], self.chooser.seconds[not asleep]
            log.info(
                f"threads wait for each other {how}: {now:.2g} s a step instead of {else_:.2g} s"
            )

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._close()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._close()

    def _close(self) -> None:
        self._stop_timer()
        self._wait(asleep=False)

    def _stop_timer(self) -> None:
        if self.timer:
            self.timer.cancel()
            self.timer.join()
            self.timer = None

    def _wait(self, *, asleep: bool) -> None:
        """Let threads wait so from now on."""
        if asleep and self.library and not self.team:
            self.team = IdleTeam(self.library, torch.get_num_threads())
        elif not asleep and self.team:
            self.team.close()
            self.team = None
