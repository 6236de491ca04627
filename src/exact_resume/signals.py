"""Answer a signal: save at the end of this step, and exit with a code that says "run me again".

    during the imports  exit at once, without a trace
    before training     raise ``PreemptedError`` at once: there is nothing to save
    during training     only note the signal; the loop asks for it at the end of a step

A SIGINT after another signal exits at once, without saving. But torchrun sends on the SIGINT that
the terminal has sent to all: within ``COPY_S`` it is the same one. A signal that the process was
started to ignore (``nohup``, a background job of a shell) stays ignored. Python runs signal
handlers in the main thread only, so a run in another thread receives none.

A child that is forked meanwhile has the handlers of before: a signal ends it. Only a data worker
calls ``outlive_first_signal``, because the step that its parent is to finish needs it.
"""

import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import Any

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


def outlive_first_signal() -> None:
    """Ignore each signal once: call it in a data worker.

    The first is that of its process group, and the parent ends the worker. The next is for the
    worker, and ends it.
    """
    for number in _not_ignored():
        signal.signal(number, _end_at_next)


def _end_at_next(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)


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
        self._before: dict[signal.Signals, Any] = {}  # the handlers that ``restore`` puts back
        self._received = 0.0  # when, by the monotonic clock

    def install(self, *, training: bool) -> None:
        """Install the handlers; call again for training, because the Trainer installs its own.

        Args:
            training: Only note a signal; else raise ``PreemptedError`` where it arrives.
        """
        self.training = training
        for number in self.handled:
            handler = signal.signal(number, self._on_signal)
            self._before.setdefault(number, handler)

    def restore(self) -> None:
        """Put back the handlers that were there before the first ``install``."""
        while self._before:
            signal.signal(*self._before.popitem())

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
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


# Python forgets a signal that a child receives before it is set up. So none arrives until the child
# has the handlers of before.
_fork = threading.local()


def _installed() -> dict[signal.Signals, Any]:
    """Return the signals that a ``Preemption`` handles, and their handlers before."""
    found: dict[signal.Signals, Any] = {}
    for number in SIGNALS:
        owner = getattr(signal.getsignal(number), "__self__", None)
        if isinstance(owner, Preemption):
            before = owner._before.get(number)
            found[number] = signal.SIG_DFL if before in (None, _exit_now) else before
    return found


def _before_fork() -> None:
    _fork.handlers = _installed()
    _fork.mask = signal.pthread_sigmask(signal.SIG_BLOCK, _fork.handlers)


def _after_fork_in_parent() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _fork.mask)


def _after_fork_in_child() -> None:
    for number, handler in _fork.handlers.items():
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, _fork.mask)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )
