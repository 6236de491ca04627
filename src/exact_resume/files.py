"""Files and directories that are still there, whole, after a power cut; and the lock of a file.

A file's bytes are durable once it was synced, and its name once its directory was.
"""

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

# How file systems say that they do not have a call: CIFS, FUSE, Lustre without `flock`, NFS without
# a lock service.
MISSING = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}
# On macOS fsync leaves the bytes in the drive's own memory, which a power cut empties; this does
# not.
FULL_FSYNC = getattr(fcntl, "F_FULLFSYNC", None)

log = logging.getLogger(__name__)
warned: set[int] = set()  # numbers of the file systems that were warned of


class LockUnsupportedError(OSError):
    """The file system cannot lock files."""


@contextmanager
def open_durable(path: Path) -> Iterator[BinaryIO]:
    """Open a new file at ``path``, to be written once; its bytes are durable when the block
    ends.
    """
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
    fsync_directory(
        directory.parent
    )  # even if it is there: who made it may have been killed before doing so


def fsync(descriptor: int) -> None:
    """Make the bytes of an open file durable."""
    if FULL_FSYNC:
        with suppress(OSError):  # of a drive or a network that does not know it
            fcntl.fcntl(descriptor, FULL_FSYNC)
            return
    os.fsync(descriptor)


def fsync_directory(directory: Path) -> None:
    """Make the names in ``directory`` durable; warn once where the file system cannot do that."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in MISSING:
            raise
        _warn(os.fstat(descriptor).st_dev, directory)
    finally:
        os.close(descriptor)


def lock_file(file: IO[Any], *, wait: bool = False) -> bool:
    """Lock ``file`` for this process until it is closed or the process ends; return whether it is
    locked now.

    The lock is a POSIX record lock: it belongs to the process, and not to its children, which may
        outlive it.

    Args:
        file: open for writing.
        wait: for as long as another process holds it.

    Raises:
        LockUnsupportedError: if the file system has no locks, naming the directory.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # POSIX allows either
        return False
    except OSError as error:
        if error.errno not in MISSING:
            raise
        raise LockUnsupportedError(
            f"{Path(file.name).parent} is on a file system that cannot lock files: use a local "
            f"disk; docs/storage.md"
        ) from error
    return True


def _warn(device: int, directory: Path) -> None:
    if device not in warned:
        warned.add(device)
        log.warning(
            "%s is on a file system that cannot sync a directory: a power cut, but no kill, may "
            "take the newest "
            "checkpoint, and the one before it is used; docs/storage.md",
            directory,
        )
