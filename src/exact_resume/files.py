"""Durable files and directories: they survive a power cut. And the lock of a file.

The bytes of a file are durable once the file was synced; its name, once its directory was synced.
"""

import errno
import fcntl
import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

# File systems answer with these where a call is missing: CIFS, FUSE, Lustre without `flock`, NFS
# without a lock service.
UNSUPPORTED_ERRNOS = {
    errno.EINVAL,
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.ENOLCK,
}
# On macOS fsync leaves the bytes in the memory of the drive, which a power cut empties. This call
# empties that memory, too.
FULL_FSYNC = getattr(fcntl, "F_FULLFSYNC", None)

log = logging.getLogger(__name__)
_warned_devices: set[int] = set()  # numbers of the file systems that a warning was logged for


class LockUnsupportedError(OSError):
    """The file system cannot lock files."""


class HashingWriter:
    """A file that computes the SHA-256 of what is written, so that nothing is read back.

    Args:
        file: open for writing.

    Attributes:
        sha256: the hash so far.
        size: bytes written so far.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()
        self.size = 0

    def write(self, data: Any) -> int:
        """Write ``data``, and add it to the hash."""
        self.sha256.update(data)
        self.size += memoryview(data).nbytes
        return self.file.write(data)

    def flush(self) -> None:
        """Flush the file."""
        self.file.flush()


@contextmanager
def open_durable(path: Path) -> Iterator[BinaryIO]:
    """Open a new file at ``path`` for writing; sync its bytes when the block ends."""
    with path.open("wb") as file:
        yield file
        file.flush()
        fsync(file.fileno())


@contextmanager
def atomic_write(
    path: Path, *, durable: bool = True, unique: bool = False, overwrite: bool = True
) -> Iterator[BinaryIO]:
    """Open a file that replaces ``path`` when the block ends, completely or not at all.

    The bytes go into a temporary file in the same directory, ``.NAME``, which is then renamed.

    Args:
        path: in a directory that exists.
        durable: whether it must survive a power cut. Leave it out for what can be made again.
        unique: whether other processes may write ``path`` at the same time. The temporary file
            then has the number of the process in its name, and the last writer wins.
        overwrite: whether to replace an older file. Else the first of several writers wins.

    Raises:
        FileExistsError: if ``path`` exists and ``overwrite`` is off.
    """
    suffix = f".{os.getpid()}" if unique else ""
    temporary = path.with_name(f".{path.name}{suffix}")
    try:
        with open_durable(temporary) if durable else temporary.open("wb") as file:
            yield file
        if overwrite:
            os.replace(temporary, path)
        else:
            os.link(temporary, path)
            temporary.unlink()
    except BaseException:
        temporary.unlink(missing_ok=True)  # on a full disk this frees the space
        raise
    if durable:
        fsync_directory(path.parent)


def make_directory(directory: Path) -> None:
    """Make ``directory`` and its parents, durably."""
    if not directory.is_dir():
        make_directory(directory.parent)
        directory.mkdir(exist_ok=True)
    # Also if it exists: the process that made it may have been killed before it could sync.
    fsync_directory(directory.parent)


def fsync(descriptor: int) -> None:
    """Make the bytes of an open file durable."""
    if FULL_FSYNC:
        with suppress(OSError):  # a drive or a network may not support it
            fcntl.fcntl(descriptor, FULL_FSYNC)
            return
    os.fsync(descriptor)


def fsync_directory(directory: Path) -> None:
    """Make the names in ``directory`` durable; warn once if the file system cannot do that."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED_ERRNOS:
            raise
        _warn_once(os.fstat(descriptor).st_dev, directory)
    finally:
        os.close(descriptor)


def lock_file(file: IO[Any], *, wait: bool = False) -> bool:
    """Lock ``file`` for this process until it is closed or the process ends.

    The lock is a POSIX record lock: it belongs to the process, and its children, which may outlive
    it, do not inherit it.

    Args:
        file: open for writing.
        wait: for as long as another process holds the lock.

    Returns:
        whether this process has the lock now.

    Raises:
        LockUnsupportedError: if the file system has no locks, naming the directory.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # POSIX allows either
        return False
    except OSError as error:
        if error.errno not in UNSUPPORTED_ERRNOS:
            raise
        raise LockUnsupportedError(
            f"{Path(file.name).parent} is on a file system that cannot lock files: use a local "
            f"disk; docs/guides/storage.md"
        ) from error
    return True


def _warn_once(device: int, directory: Path) -> None:
    if device in _warned_devices:
        return
    _warned_devices.add(device)
    log.warning(
        "%s is on a file system that cannot sync a directory: a power cut may lose the newest "
        "checkpoint, and the run then continues from the one before it. A kill loses nothing. "
        "See docs/guides/storage.md",
        directory,
    )
