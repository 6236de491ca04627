"""A signal means: save at the end of this step, and leave with a code that says "run me again".

The handler only sets a flag. SIGINT a second time stops at once, without saving.
"""

import signal
from types import FrameType

RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h: the same command will continue
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class Preempted(Exception):
    """The run was asked to stop and has saved; run the same command to continue."""


class Preemption:
    """Remembers the first signal heard since ``listen``; ``None`` while there was none."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def listen(self) -> None:
        """Install the handlers; to be called after the Trainer has installed its own."""
        for number in SIGNALS:
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the next Ctrl-C stops now
