"""Answer a signal: save at the end of this step, and exit with a code that says "run me again".

    during the imports  exit at once, without a trace
    before training     raise ``PreemptedError`` at once: there is nothing to save
    during training     only note the signal; the loop asks for it at the end of a step

A SIGINT after another signal exits at once, without saving. But torchrun sends on the SIGINT that
the terminal has sent to all: within ``COPY_S`` it is the same one. A signal that the process was
started to ignore (``nohup``, a background job of a shell) stays ignored. Python runs signal
handlers in the main thread only, so a run in another thread receives none.
"""

import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType

EXIT_RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h: the same command will continue
EXIT_INTERRUPTED = 128 + signal.SIGINT  # as a shell reports a death by Ctrl-C
NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
COPY_S = 1.0  # seconds
# Windows lacks two of them, and must still import this to say that it is not supported.
SIGNALS = tuple(signal.Signals[name] for name in NAMES if hasattr(signal, name))


class PreemptedError(BaseException):
    """The run was asked to stop and has nothing unsaved; run the same command to continue.

    Not an Exception, as KeyboardInterrupt is none: no ``except Exception`` on the way may catch it.
    """


def exit_on_signal() -> None:
    """Exit when a signal arrives, until a ``Preemption`` is installed.

    Call it before anything heavy is imported.
    """
    for number in _not_ignored():
        signal.signal(number, _exit_now)


def _exit_now(number: int, frame: FrameType | None) -> None:
    # Raise nothing: in the middle of an import, any code may catch it.
    name = signal.Signals(number).name
    line = f"{name}: nothing was trained yet. Run the same command to continue.\n"
    with suppress(OSError):
        os.write(1, line.encode())
    os._exit(EXIT_RESUMABLE)


def _not_ignored() -> list[signal.Signals]:
    return [s for s in SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]


class Preemption:
    """Notes the first signal that arrives after ``install``.

    Attributes:
        signal: The first signal received; None if there was none.
        agreed: The signal that any process of the run had received at the end of the last step; 0
            for none.
        training: Whether a signal is only noted, for the training loop to ask for.
        in_main_thread: Whether signals can be received at all.
        handled: The signals that ``install`` handles: those that are not ignored.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.agreed = 0
        self.training = False
        self.in_main_thread = threading.current_thread() is threading.main_thread()
        self.handled = _not_ignored() if self.in_main_thread else []
        self._process = os.getpid()
        self._received = 0.0  # when, by the monotonic clock

    def install(self, *, training: bool) -> None:
        """Install the handlers; call again for training, because the Trainer installs its own.

        Args:
            training: Only note a signal; else raise ``PreemptedError`` where it arrives.
        """
        self.training = training
        for number in self.handled:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            # A data worker received the signal of its process group: ignore it once, as the
            # parent ends the worker. The next signal is for the worker, and ends it.
            signal.signal(number, signal.SIG_DFL)
        elif self.signal is None:
            self.signal = signal.Signals(number)
            self._received = time.monotonic()
            if not self.training:
                raise PreemptedError(f"{self.signal.name}: nothing was trained yet")
        elif number == signal.SIGINT and not self._is_copy():
            signal.signal(number, signal.SIG_DFL)  # another one ends the process at once
            raise SystemExit(EXIT_INTERRUPTED)

    def _is_copy(self) -> bool:
        """Return whether a signal that arrives now may be torchrun's copy of the first one."""
        is_torchrun = "TORCHELASTIC_USE_AGENT_STORE" in os.environ
        return is_torchrun and time.monotonic() - self._received < COPY_S
