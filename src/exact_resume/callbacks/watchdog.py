"""A process that hangs is ended, for its launcher to start all of them again; what it was doing is
written down first.

The clock is faulthandler's: a thread in C, which needs no interpreter lock, set anew at every step.
"""

import faulthandler
import os
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from exact_resume.workers import DUMP_STACKS_SIGNAL

HEADER = 160  # bytes of the first line, which is written over at every step


def arm_start_watchdog(seconds: float) -> None:
    """From now until the callback watches: end this process after ``seconds``, its stacks go to
    standard error.
    """
    faulthandler.dump_traceback_later(seconds, exit=True)


class Watchdog(Callback):
    """Ends the process with exit code 1 when it exceeds its limit; to stand before callbacks that
    take their time.

    ============================  =============================================
    until the second step is done ``start`` seconds: loading and compilation; ``arm_start_watchdog``
        before
    a step                        ``factor`` times the usual, or ``at_least``
    between steps                 ``pause``: validation (a batch), grids, saves
    ============================  =============================================

    A process waits in its step for one that is still between steps. So whatever one of them does
    there alone, and for long, must end at a barrier.

    The stacks of all threads are in ``hang-rank0.txt``; SIGUSR2 adds them at any time, and ends
    nothing.

    Attributes:
        armed: whether it ends the process. Not one that nobody starts again, and that Ctrl-Z may
            stop.
        directory: where the file goes, ``attempts/NNN`` of the run; None for standard error.
    """

    def __init__(
        self, *, factor: float = 20, at_least: float = 60, start: float = 1800, pause: float = 1800
    ) -> None:
        for name, value in {
            "factor": factor,
            "at_least": at_least,
            "start": start,
            "pause": pause,
        }.items():
            if value <= 0:
                raise ValueError(f"callbacks.watchdog.{name}={value} must be above 0")
        self.factor, self.at_least, self.start, self.pause = factor, at_least, start, pause
        self.armed = False
        self.directory: Path | None = None
        self.path: Path | None = None
        self.file = 2  # a descriptor
        self.times: deque[float] = deque(maxlen=50)  # seconds of the last steps, without the first
        self.begun, self.first = 0.0, True

    def limit(self) -> float:
        """Seconds that a step may take now."""
        return max(self.at_least, self.factor * median(self.times)) if self.times else self.start

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.directory:
            with suppress(OSError):  # a full disk: then to standard error
                self._open(self.directory / f"hang-rank{trainer.global_rank}.txt")
        faulthandler.unregister(
            DUMP_STACKS_SIGNAL
        )  # a stock Trainer puts handlers back behind its back
        faulthandler.register(DUMP_STACKS_SIGNAL, self.file)
        self._watch(self.start, "the start")

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        self.begun = time.monotonic()
        self._watch(self.limit(), f"step {trainer.global_step + 1}")

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if not self.first:
            self.times.append(time.monotonic() - self.begun)
        self.first = False
        self._watch(self.pause, f"what follows step {trainer.global_step}")

    def on_validation_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        self._watch(self.pause, f"the validation of step {trainer.global_step}")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._watch(self.pause, f"what follows the validation of step {trainer.global_step}")

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._close()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._close()

    def _watch(self, seconds: float, what: str) -> None:
        """From now on, ``what`` may take so many seconds."""
        if not self.armed:
            return
        if self.path:
            line = f"Watched: {what}, at most {seconds:.4g} s. If it took longer, this is where it was:"
            with suppress(OSError):  # a full disk
                os.pwrite(self.file, f"{line:<{HEADER - 1}}\n".encode(), 0)
        faulthandler.dump_traceback_later(seconds, exit=True, file=self.file)

    def _open(self, path: Path) -> None:
        for old in path.parent.parent.glob(
            f"*/{path.name}"
        ):  # of attempts that were killed, and did not hang
            if old.stat().st_size <= HEADER:
                old.unlink()
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self.path = path
        os.lseek(self.file, HEADER, os.SEEK_SET)

    def _close(self) -> None:
        if self.armed:
            self.armed = False
            faulthandler.cancel_dump_traceback_later()
        if self.path:
            faulthandler.register(
                DUMP_STACKS_SIGNAL, 2
            )  # to the end of the process: without it the signal would be the end
            if os.fstat(self.file).st_size <= HEADER:
                self.path.unlink(missing_ok=True)
            os.close(self.file)
            self.path, self.file = None, 2
