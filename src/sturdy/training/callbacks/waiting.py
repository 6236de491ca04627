"""How the CPU threads of a step wait for each other: spinning, or asleep.

The threads meet after every loop of every layer. A thread that comes first spins, which is fastest while each has a
CPU to itself. Where other programs want the CPUs, too, it spins on the one that the thread it waits for should get, and
steps take ten times as long. Asleep they take three times as long then, but also a third longer on a quiet machine.
So both ways are tried, and the faster one is used. The bits are the same: who computes what does not change.

GNU's OpenMP, which torch brings along on Linux, reads its settings only once. But it lets threads sleep while there
are more OpenMP threads than CPUs (its manual, at ``GOMP_SPINCOUNT``). A second team, which does nothing, makes them
that many.
"""

import ctypes
import os
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from sturdy.resume import world
from sturdy.training.attempt import CONSOLE

POLICIES = ("auto", "spin", "sleep")
OWN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # environment variables with which somebody has chosen already


class Chooser:
    """Find the faster of two ways to wait, from the seconds that each step took.

    The other way is tried for ``n`` steps: at the beginning, when steps have become slower or faster by ``change``,
    and now and then. It is taken if it was faster by ``gain``, and the old way, tried once more, still is not.
    A trial ends as soon as its steps have taken longer than they may, so that one costs a step more, at most.

    Args:
        n: steps of a trial, and steps that are compared with it.
        skip: first steps that are not counted.
        gain, change: factors above 1.
        soonest, often, seldom: seconds between two trials: at least, after a change of way, and at most. The pause
            doubles with each trial that changes nothing.

    Attributes:
        asleep: whether the next step waits asleep.
        changed: whether the last observed step has changed the way, for good and not for a trial.
        seconds: of a step, the way that was left and the way that was taken.
    """

    def __init__(
        self,
        *,
        n: int = 5,
        skip: int = 3,
        gain: float = 1.15,
        change: float = 1.5,
        soonest: float = 10,
        often: float = 30,
        seldom: float = 600,
    ) -> None:
        self.n, self.skip, self.gain, self.change = n, skip, gain, change
        self.soonest, self.often, self.seldom = soonest, often, seldom
        self.asleep = self.changed = False
        self.seconds = (0.0, 0.0)
        self.usual: deque[float] = deque(maxlen=n)  # steps of the way that is used
        self.other: list[float] = []  # steps of the way that is tried
        self.again: list[float] = []  # steps of the old way, tried once more
        self.phase = self._use
        self.pause, self.since, self.reference = often, 0.0, 0.0

    def observe(self, seconds: float) -> None:
        """Take in the time of a step, which has waited as ``asleep`` says, and decide on the next."""
        self.changed = False
        if self.skip:
            self.skip -= 1
            return
        self.phase(seconds)

    def _use(self, seconds: float) -> None:
        self.usual.append(seconds)
        self.since += seconds
        if len(self.usual) == self.n and self._due():
            self.other, self.asleep, self.phase = [], not self.asleep, self._try

    def _due(self) -> bool:
        now = sum(self.usual)
        moved = not self.reference / self.change < now < self.reference * self.change
        return not self.reference or self.since > self.pause or (moved and self.since > self.soonest)

    def _try(self, seconds: float) -> None:
        self.other.append(seconds)
        if sum(self.other) * self.gain > sum(self.usual):
            self._keep(not self.asleep)
        elif len(self.other) == self.n:
            self.again, self.asleep, self.phase = [], not self.asleep, self._confirm

    def _confirm(self, seconds: float) -> None:
        self.again.append(seconds)
        if sum(self.again) > sum(self.other) * self.gain:
            self.changed = True
            self.seconds = (sum(self.again) / len(self.again), sum(self.other) / self.n)
            self.usual = deque(self.other, maxlen=self.n)
            self._keep(not self.asleep)
        elif len(self.again) == self.n:
            self.usual = deque(self.again, maxlen=self.n)
            self._keep(self.asleep)

    def _keep(self, asleep: bool) -> None:
        self.pause = self.often if self.changed else min(2 * self.pause, self.seldom)
        self.asleep, self.phase, self.since, self.reference = asleep, self._use, 0.0, sum(self.usual)


class IdleTeam:
    """Threads of GNU's OpenMP that do nothing, so many that all of its threads wait asleep until ``close``.

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
        nothing = ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p)  # each thread calls free(NULL)
        self.library.GOMP_parallel(nothing, None, ctypes.c_uint(self.size), ctypes.c_uint(0))
        self.there.set()
        self.end.wait()  # the team is there for as long as its first thread


def gnu_openmp() -> ctypes.CDLL | None:
    """Find the GNU OpenMP library that torch has loaded; None where it has another one, or none."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return None
    loaded = {line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines() if "/libgomp" in line}
    home = str(Path(torch.__file__).parent.parent)
    return ctypes.CDLL(min(loaded, key=lambda path: not path.startswith(home))) if loaded else None


class Waiting(Callback):
    """Lets the threads of a step wait in the way that is faster at present; on a CPU, and with more than one thread.

    Rank 0 decides for all processes: the slowest one makes the step.

    Args:
        policy: ``auto``, ``spin`` as OpenMP does by itself, or ``sleep``.
    """

    def __init__(self, *, policy: str = "auto") -> None:
        if policy not in POLICIES:
            raise ValueError(f"callbacks.waiting.policy={policy} must be one of {', '.join(POLICIES)}")
        self.policy = policy
        self.chooser = Chooser()
        self.library: ctypes.CDLL | None = None
        self.team: IdleTeam | None = None
        self.auto, self.begun = False, 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        applies = trainer.strategy.root_device.type == "cpu" and torch.get_num_threads() > 1
        self.library = gnu_openmp() if applies and not any(name in os.environ for name in OWN) else None
        self.auto = self.policy == "auto" and bool(world.heard(self.library is not None))
        self._wait(asleep=self.policy == "sleep")

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if self.auto:
            self._wait(asleep=bool(world.heard(self.chooser.asleep and trainer.is_global_zero)))
            self.begun = time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if not self.auto:
            return
        self.chooser.observe(time.monotonic() - self.begun)
        if self.chooser.changed and trainer.is_global_zero:
            before, after = self.chooser.seconds
            how = "asleep, as other programs use the CPUs, too" if self.chooser.asleep else "spinning again"
            CONSOLE.info(f"threads wait for each other {how}: {after:.3g} s a step instead of {before:.3g}")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._wait(asleep=False)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._wait(asleep=False)

    def _wait(self, *, asleep: bool) -> None:
        """Let threads wait so from now on."""
        if asleep and self.library and not self.team:
            self.team = IdleTeam(self.library, torch.get_num_threads())
        elif not asleep and self.team:
            self.team.close()
            self.team = None
