"""Shards in a folder or at a URL: listed, read from end to end, or a range of bytes at a time."""

import contextlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, TypeVar

from sturdy.data.listing import printable
from sturdy.data.roots import check_exists
from sturdy.data.shard_index import Shard

EXTRA = "pip install 'sturdy-diffusion[remote]'"
DELAYS_S = (0.5, 1, 2, 4)  # before a read that failed is tried again
READERS = 16  # threads of a process that read from a URL, where a read is mostly waiting
BLOCK = 2**24  # bytes read at a time from end to end

log = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R")


class ShardError(OSError):
    """A shard cannot be read; the message says which."""


class ShardChangedError(ShardError):
    """A shard is gone, or not what the index says; it may be put back."""


class ShardStore:
    """The tar files directly in ``root``. It pickles as its root.

    Args:
        root: a folder, or a URL of fsspec such as ``s3://bucket/shards``.

    Attributes:
        root: absolute, without a slash at its end.
        is_remote: whether it is a URL.

    Raises:
        ValueError: it is no folder and no URL that can be used.
        FileNotFoundError: there is no such folder.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        if not isinstance(root, str | os.PathLike) or not os.fspath(root):
            raise ValueError(
                f"root={root} must be the folder or the URL of the shards: `python -m "
                f"sturdy.data.shards pack FOLDER OUT` makes some"
            )
        text = os.fspath(root)
        self.is_remote = re.match(r"[a-z][a-z0-9+.-]+://", text, re.IGNORECASE) is not None
        self._process = 0  # that connected, and has the threads
        if self.is_remote:
            if re.search(r"://[^@/]*:[^@/]*@", text):
                raise ValueError(
                    "root= must hold no password, as it goes into configs and logs; give it in the "
                    "environment or in the files of the library, such as ~/.aws/credentials"
                )
            self.root = text.rstrip("/")
            self._connect()
            return
        path = Path(text).expanduser().absolute()
        self.root = str(path)
        check_exists(path)
        if not path.is_dir():
            raise ValueError(f"root={printable(path)} is a file: give the folder of the shards")

    def __reduce__(self) -> tuple[type["ShardStore"], tuple[str]]:
        return ShardStore, (self.root,)

    def shards(self) -> list[Shard]:
        """Return the shards, sorted by name.

        Raises:
            ShardError: they cannot be listed.
        """
        found = self._retried("the list of shards", self._list)
        return sorted(shard for shard in found if is_shard(shard.name))

    def open(self, name: str) -> IO[bytes]:
        """Open a file to read it from end to end."""
        if self.is_remote:
            fs, root = self._connect()
            file: IO[bytes] = fs.open(f"{root}/{name}", "rb", block_size=BLOCK)
            return file
        return open(os.path.join(self.root, name), "rb")

    def read_file(self, name: str) -> bytes:
        """Return the content of a small file.

        Raises:
            FileNotFoundError: it is not there.
            ShardError: it cannot be read.
        """

        def read() -> bytes:
            with self.open(name) as file:
                return file.read()

        return self._retried(name, read)

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Return ``size`` bytes of a shard from ``offset`` on; fewer where it is cut short.

        Raises:
            ShardChangedError: it is gone.
            ShardError: it cannot be read.
        """
        try:
            return self._retried(name, lambda: self._read(name, offset, size))
        except FileNotFoundError:
            raise ShardChangedError(f"root={self.root}: the shard {name} is gone") from None

    def map(self, function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
        """Yield ``function`` of each item, in order; several at once where reads are slow."""
        if not self.is_remote or len(items) < 2:
            return map(function, items)
        self._connect()
        return self._threads.map(function, items)

    def _list(self) -> list[Shard]:
        if not self.is_remote:
            with os.scandir(self.root) as entries:
                stats = [(entry.name, entry.stat()) for entry in entries if is_shard(entry.name)]
            return [Shard(name, stat.st_size, str(stat.st_mtime_ns)) for name, stat in stats]
        fs, root = self._connect()
        fs.invalidate_cache()
        shards = []
        for entry in fs.ls(root, detail=True):
            name = str(entry["name"]).rstrip("/").rsplit("/", 1)[-1]
            mark = entry.get("ETag") or entry.get("mtime") or entry.get("LastModified")
            shards.append(Shard(name, int(entry["size"] or 0), str(mark)))
        return shards

    def _read(self, name: str, offset: int, size: int) -> bytes:
        if self.is_remote:
            fs, root = self._connect()
            content: bytes = fs.cat_file(f"{root}/{name}", start=offset, end=offset + size)
            return content
        with open(os.path.join(self.root, name), "rb", buffering=0) as file:
            return os.pread(file.fileno(), size, offset)

    def _connect(self) -> tuple[Any, str]:
        """Return the file system and the path in it; a forked process connects anew."""
        if self._process != os.getpid():
            try:
                from fsspec.core import url_to_fs

                # A file system of another process must not be found again.
                options = {"use_listings_cache": False, "skip_instance_cache": True}
                self._fs, path = url_to_fs(self.root, **options)
            except ImportError as error:
                raise ValueError(
                    f"root={self.root} needs more packages ({error}): {EXTRA}"
                ) from None
            except ValueError as error:
                raise ValueError(f"root={self.root} cannot be used: {error}") from None
            self._path = str(path).rstrip("/")
            self._threads = ThreadPoolExecutor(READERS, thread_name_prefix="shards")
            self._process = os.getpid()
        return self._fs, self._path

    def _retried(self, what: str, read: Callable[[], T]) -> T:
        """Call ``read`` again after errors that may pass.

        Raises:
            FileNotFoundError: it is not there.
            ShardError: it fails again and again.
        """
        for delay in (*DELAYS_S, None):
            try:
                return read()
            except FileNotFoundError:
                raise
            except Exception as error:  # each library of fsspec has its own types
                reason = f"{type(error).__name__}: {error}".rstrip(": ")
                if delay is None or isinstance(error, PermissionError):
                    number = getattr(error, "errno", None)
                    message = f"root={self.root}: {what} cannot be read ({reason})"
                    raise _with_errno(message, number) from None
                log.warning("%s cannot be read (%s); again in %g s", what, reason, delay)
                time.sleep(delay)
        raise AssertionError


def is_shard(name: str) -> bool:
    """Return whether a file with this name is a shard; one that is being written is hidden."""
    return name.endswith(".tar") and not name.startswith(".")


def _with_errno(message: str, number: int | None) -> ShardError:
    """Return an error with this message alone, whose number says whether it may pass."""
    error = ShardError(message)
    with contextlib.suppress(AttributeError):
        error.errno = number
    return error
