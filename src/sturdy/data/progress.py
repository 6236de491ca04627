"""How far a job of minutes is, said while it runs: one line in place on a terminal, a line now and
then in a file.

A job that takes no time says nothing.
"""

import sys
import time
from types import TracebackType
from typing import Self, TextIO


class Progress:
    """Told ``(done, total)``, it says so; the first call starts the clock.

    Args:
        what: the job, ``"preparing images"``.
        stream: where to, standard error unless given.
        patience: seconds of silence at the start.
        pace: seconds between two lines in a file; on a terminal the line changes ten times a
            second.
    """

    def __init__(
        self, what: str, *, stream: TextIO | None = None, patience: float = 2.0, pace: float = 30.0
    ) -> None:
        self.what, self.stream, self.patience = what, stream or sys.stderr, patience
        self.terminal = self.stream.isatty()
        self.pace = 0.1 if self.terminal else pace
        self.start: float | None = None
        self.said = False
        self.open = False  # whether the terminal's line still waits for its end

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self.start is None:
            self.start, self.next = now, now + self.patience
        last = done == total and self.said
        if now >= self.next or last:
            self._say(done, total, now - self.start)
            self.said, self.next = True, now + self.pace

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self.open:
            print(file=self.stream, flush=True)

    def _say(self, done: int, total: int, seconds: float) -> None:
        rest = (
            f"{_span(seconds)} so far"
            if done == 0
            else f"{_span(seconds * (total - done) / done)} left"
        )
        line = f"{self.what}: {done:,} of {total:,}, {rest if done < total else f'took {_span(seconds)}'}"
        self.open = self.terminal and done < total
        print(
            f"\r{line}\x1b[K" if self.terminal else line,
            end="" if self.open else "\n",
            file=self.stream,
            flush=True,
        )


def _span(seconds: float) -> str:
    """``"8 s"``, ``"12 min"`` or ``"3.4 h"``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
