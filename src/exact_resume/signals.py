"""A signal means: save at the end of this step, and leave with a code that says "run me again".

    during imports     leave where the signal arrives, without a trace
    before training    nothing to save: leave where the signal arrives
    while it runs      only remember it, for the loop to ask at a step's end

SIGINT after a signal stops at once, without saving. A signal that the process was started to ignore
(``nohup``, a shell's background job) is left ignored. Python hears signals in the main thread only:
a run in another one hears none.
"""

import os
import signal
import threading
from contextlib import suppress
from types import FrameType

EXIT_RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h: the same command will continue
EXIT_INTERRUPTED = 128 + signal.SIGINT  # as a shell counts a death by Ctrl-C
NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
SIGNALS = tuple(
    signal.Signals[name] for name in NAMES if hasattr(signal, name)
)  # the door says that Windows lacks two


class PreemptedError(BaseException):
    """The run was asked to stop and has nothing unsaved; run the same command to continue.

    Like KeyboardInterrupt no Exception: on its way out nobody shall take it for an error of his
        own.
    """


def exit_on_signal() -> None:
    """Until a ``Preemption`` listens, leave where a signal arrives; to be called before anything
    heavy is imported.
    """
    for number in _not_ignored():
        signal.signal(number, _exit_now)


def _exit_now(number: int, frame: FrameType | None) -> None:
    # No exception: in the middle of an import nobody knows who would catch it.
    line = f"{signal.Signals(number).name}: nothing was trained yet. Run the same command to continue.\n"
    with suppress(OSError):
        os.write(1, line.encode())
    os._exit(EXIT_RESUMABLE)


def _not_ignored() -> list[signal.Signals]:
    return [s for s in SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]


class Preemption:
    """Hears signals from ``listen`` on; ``signal`` is the first one heard, ``None`` while there was
    none.

    Attributes:
        deaf: whether it cannot hear any, outside the main thread.
        agreed: the signal that any process of the run had heard at the end of the last step; 0 for
            none.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.agreed = 0
        self.training = False
        self.process = os.getpid()
        self.deaf = threading.current_thread() is not threading.main_thread()
        self.heeded = [] if self.deaf else _not_ignored()

    def listen(self, *, training: bool) -> None:
        """Install the handlers; for training once more, because the Trainer installs some of its
        own.
        """
        self.training = training
        for number in self.heeded:
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if (
            os.getpid() != self.process
        ):  # a worker that heard what its group was told: its parent decides
            signal.signal(number, signal.SIG_DFL)  # the next one is meant for it
        elif self.signal is None:
            self.signal = signal.Signals(number)
            if not self.training:
                raise PreemptedError(f"{self.signal.name}: nothing was trained yet")
        elif number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)  # should even that take too long
            raise SystemExit(EXIT_INTERRUPTED)
