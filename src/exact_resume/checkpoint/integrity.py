"""Whether the bytes of a checkpoint are those that were written, and the errors that say not."""

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# A file that is gone or on bad sectors is damaged. After any other error it may be intact.
DAMAGE_ERRNOS = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO}


class CorruptCheckpointError(ValueError):
    """A checkpoint does not verify; the message names the file and the reason."""


class CheckpointLoadError(ValueError):
    """A file cannot be loaded as tensors and primitives; nothing in it was executed."""


class NoValidCheckpointError(Exception):
    """There are checkpoints, but this version can use none of them."""


def classify_io_error(name: str, error: OSError) -> Exception:
    """Return a CorruptCheckpointError if ``error`` means that the file is damaged, else ``error``.

    A file that is gone or on bad sectors is damaged. A missing permission or a network that is
    down says nothing about the file.
    """
    if error.errno in DAMAGE_ERRNOS:
        return CorruptCheckpointError(f"{name} cannot be read: {error.strerror}")
    return error


def check_size(path: Path, expected: Mapping[str, Any]) -> None:
    """Check the size of a file before it is read: a device or a FIFO might never end."""
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise CorruptCheckpointError(f"{path.name} has {size} bytes instead of {expected['bytes']}")


def check_hash(name: str, found: str, expected: Mapping[str, Any]) -> None:
    """Check the SHA-256 of a file that was read."""
    if found != expected["sha256"]:
        raise CorruptCheckpointError(
            f"{name} has changed since it was written (its SHA-256 differs)"
        )
