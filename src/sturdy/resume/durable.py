"""Files and directories that are still there, whole, after a power cut.

A file's bytes are durable once it was fsynced, and its name once its directory was.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


class Hashing:
    """A file that hashes what is written, so that it is never read back to be summed."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.sha256, self.size = file, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        self.size += memoryview(data).nbytes
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


@contextmanager
def durable(path: Path) -> Iterator[Hashing]:
    """A new file at ``path`` to be written once; its bytes are durable when the block ends."""
    with path.open("wb") as file:
        yield Hashing(file)
        file.flush()
        os.fsync(file.fileno())


def make_directory(directory: Path) -> None:
    """Make ``directory`` and its parents, durably."""
    if not directory.is_dir():
        make_directory(directory.parent)
        directory.mkdir(exist_ok=True)
    fsync_directory(directory.parent)  # even if it is there: who made it may have been killed before doing so


def fsync_directory(directory: Path) -> None:
    """Make the names in ``directory`` durable."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
