"""Standard output and error that never end a run: their reader may go away, the disk be full."""

import io
import sys
from typing import Any


class LossyFile(io.FileIO):
    """A file descriptor that accepts all data, and drops what cannot be written now."""

    def write(self, data: Any) -> int:
        """Write ``data`` if possible; return its size in any case."""
        try:
            written = super().write(data)
        except OSError:  # the reader of the pipe or the terminal is gone, or the disk is full
            written = None
        if written is None:  # also if a non-blocking pipe is full
            return len(data)
        return written


def make_streams_lossy() -> None:
    """Replace ``sys.stdout`` and ``sys.stderr`` by lossy streams.

    A stream without a file descriptor, such as a notebook's or a test's, stays as it is.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper):
            continue
        raw = getattr(stream.buffer, "raw", stream.buffer)  # python -u has no buffer
        if not isinstance(raw, io.FileIO):
            continue
        lossy: Any = LossyFile(stream.fileno(), "wb", closefd=False)
        buffer = lossy if raw is stream.buffer else io.BufferedWriter(lossy)
        wrapper = io.TextIOWrapper(
            buffer,
            encoding=stream.encoding,
            errors=stream.errors,
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        setattr(sys, name, wrapper)
