"""Standard output and error that nobody need read: a reader that goes away, or a full disk, ends no
run.
"""

import io
import sys
from typing import Any


class Lossy(io.FileIO):
    """A file descriptor that takes everything; what cannot be written now is dropped."""

    def write(self, data: Any) -> int:
        try:
            written = super().write(data)
        except OSError:  # the pipe's reader or the terminal is gone, the disk is full
            written = None
        return (
            len(data) if written is None else written
        )  # None, too, if a pipe that must not block is full


def outlive_readers() -> None:
    """Make ``sys.stdout`` and ``sys.stderr`` lossy where they write to a file descriptor."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper) or not isinstance(
            getattr(stream.buffer, "raw", stream.buffer), io.FileIO
        ):
            continue  # a notebook's, or a test's
        raw = Lossy(stream.fileno(), "wb", closefd=False)
        buffer: Any = (
            raw if isinstance(stream.buffer, io.FileIO) else io.BufferedWriter(raw)
        )  # python -u has no buffer
        lossy = io.TextIOWrapper(
            buffer,
            encoding=stream.encoding,
            errors=stream.errors,
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        setattr(sys, name, lossy)
