"""End a process that hangs, so that its launcher starts all of them again; write its stacks first.

The clock is faulthandler's: a thread in C that needs no interpreter lock, set anew at every step.
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
from typing_extensions import override

from exact_resume.workers import DUMP_STACKS_SIGNAL

HEADER = 160  # bytes of the first line, which is overwritten at every step
STDERR = 2  # file descriptor


def arm_start_watchdog(seconds: float) -> None:
    """End this process after ``seconds``, unless the callback takes over before."""
    faulthandler.dump_traceback_later(seconds, exit=True)


def disarm_start_watchdog() -> None:
    """Let this process take its time, until the watchdog is armed again."""
    faulthandler.cancel_dump_traceback_later()


class Watchdog(Callback):
    """Ends the process with exit code 1 when it exceeds its time limit.

    It stands before callbacks that take their time.

    ==============================  =============================================
    until the second step is done   ``start`` seconds: loading and compilation
    a step                          ``factor`` times the usual, or ``at_least``
    between steps                   ``pause``: a validation batch, images, a save
    ==============================  =============================================

    A process waits in its step for others that are still between steps. So whatever one of them
    does there alone, and for long, must end at a barrier.

    The stacks of all threads go to ``hang-rank0.txt``. SIGUSR2 adds them at any time and ends
    nothing.

    Attributes:
        armed: whether it ends the process. It must not, where nobody starts the process again or
            Ctrl-Z may stop it.
        directory: where the file goes, the attempt's directory; None for standard error.
    """

    def __init__(
        self,
        *,
        factor: float = 20,
        at_least: float = 60,
        start: float = 1800,
        pause: float = 1800,
    ) -> None:
        options = {"factor": factor, "at_least": at_least, "start": start, "pause": pause}
        for name, value in options.items():
            if value <= 0:
                raise ValueError(f"{name}={value} must be above 0")
        self.factor = factor
        self.at_least = at_least
        self.start = start
        self.pause = pause
        self.armed = False
        self.directory: Path | None = None
        self.path: Path | None = None
        self.file = STDERR
        self.times: deque[float] = deque(maxlen=50)  # seconds of the last steps, but the first
        self.begun = 0.0
        self.is_first = True

    def limit(self) -> float:
        """Return the seconds that a step may take now."""
        if not self.times:
            return self.start
        return max(self.at_least, self.factor * median(self.times))

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.directory:
            with suppress(OSError):  # a full disk: the stacks go to standard error
                self._open(self.directory / f"hang-rank{trainer.global_rank}.txt")
        faulthandler.unregister(DUMP_STACKS_SIGNAL)
        faulthandler.register(DUMP_STACKS_SIGNAL, self.file)
        self._watch(self.start, "the start")

    @override
    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        self.begun = time.monotonic()
        self._watch(self.limit(), f"step {trainer.global_step + 1}")

    @override
    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if not self.is_first:
            self.times.append(time.monotonic() - self.begun)
        self.is_first = False
        self._watch(self.pause, f"what follows step {trainer.global_step}")

    @override
    def on_validation_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        self._watch(self.pause, f"the validation of step {trainer.global_step}")

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._watch(self.pause, f"what follows the validation of step {trainer.global_step}")

    @override
    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._close()

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._close()

    def _watch(self, seconds: float, what: str) -> None:
        """Allow ``what`` to take ``seconds`` from now on."""
        if not self.armed:
            return
        if self.path:
            line = f"Watched: {what}, at most {seconds:.4g} s. "
            line += "If it took longer, this is where it was:"
            with suppress(OSError):  # a full disk
                os.pwrite(self.file, f"{line:<{HEADER - 1}}\n".encode(), 0)
        faulthandler.dump_traceback_later(seconds, exit=True, file=self.file)

    def _open(self, path: Path) -> None:
        """Open the file, and delete those of earlier attempts that did not hang."""
        for old in path.parent.parent.glob(f"*/{path.name}"):
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
            # Without a handler, the signal would end the process.
            faulthandler.register(DUMP_STACKS_SIGNAL, STDERR)
            if os.fstat(self.file).st_size <= HEADER:
                self.path.unlink(missing_ok=True)
            os.close(self.file)
            self.path = None
            self.file = STDERR
