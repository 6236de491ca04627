"""Messages about the progress of a long job."""

import sys
import time
from types import TracebackType
from typing import Self, TextIO


class ProgressPrinter:
    """Prints how far a job is: one changing line on a terminal, a line now and then in a file.

    Call it with ``(done, total)``. The first call starts the clock, and the call with
    ``done == total`` ends it. A short job prints nothing. As a context, it ends an open line of the
    terminal when an error ends the job.

    Args:
        what: the job, ``"preparing images"``.
        stream: where to print; standard error by default.
        patience: seconds of silence at the start.
        interval: seconds between two lines in a file; a terminal's line changes ten times a second.
    """

    def __init__(
        self,
        what: str,
        *,
        stream: TextIO | None = None,
        patience: float = 5.0,
        interval: float = 30.0,
    ) -> None:
        self.what = what
        self.stream = stream or sys.stderr
        self.patience = patience
        self.is_terminal = self.stream.isatty()
        self.interval = 0.1 if self.is_terminal else interval
        self.start: float | None = None
        self.next = 0.0
        self.has_printed = False
        self.is_open = False  # whether the terminal's line has no end yet

    def __call__(self, done: int, total: int) -> None:
        """Print a line if it is time for one.

        Args:
            done: parts of the job that are done.
            total: all of them.
        """
        now = time.monotonic()
        if self.start is None:
            self.start = now
            self.next = now + self.patience
        is_last = done >= total and self.has_printed
        if now >= self.next or is_last:
            self._print(done, total, now - self.start)
            self.has_printed = True
            self.next = now + self.interval
        if done >= total:
            self.start = None  # the next call begins another job
            self.has_printed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.is_open:
            print(file=self.stream, flush=True)

    def _print(self, done: int, total: int, seconds: float) -> None:
        if done >= total:
            when = f"took {format_seconds(seconds)}"
        elif done == 0:
            when = f"{format_seconds(seconds)} so far"
        else:
            when = f"{format_seconds(seconds * (total - done) / done)} left"
        line = f"{self.what}: {done:,} of {total:,}, {when}"
        self.is_open = self.is_terminal and done < total
        if self.is_terminal:
            line = f"\r{line}\x1b[K"
        print(line, end="" if self.is_open else "\n", file=self.stream, flush=True)


def format_seconds(seconds: float) -> str:
    """Return ``"8 s"``, ``"12 min"`` or ``"3.4 h"``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
