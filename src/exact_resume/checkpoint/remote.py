"""A place for the second copy of a run: a bucket, or a directory on another disk.

    URL/checkpoints/step-00000500/{state.ckpt, score.json, manifest.json}
    URL/metrics.csv, skips.jsonl, attempts/, samples/, ...      as in the run's directory
    URL/record.json     size and SHA-256 of each of these small files
    URL/owner.json      the process that copies now
    URL/abandoned/001/  checkpoints that a resume at an older step went back behind

A checkpoint is there if its manifest is: it comes last, when every other file was read back and
found equal, and it goes first. Files have the names that they have on disk, so any tool can copy
them back. The library fsspec reads and writes; it finds credentials where its users have them.
"""

import hashlib
import json
import os
import socket
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO, Any

from exact_resume.checkpoint.reading import MANIFEST, STEP_DIRNAME, manifest_hash, step_dirname
from exact_resume.checkpoint.remote_url import check_mounted, check_url, connect
from exact_resume.checkpoint.store import SCORE
from exact_resume.files import atomic_write, make_directory
from exact_resume.run import AlreadyRunningError

CHECKPOINTS = "checkpoints"
ABANDONED = "abandoned"
OWNER = "owner.json"
CHUNK = 2**24  # bytes in memory at a time
# Errors that come again until a person mends them; these have no type of their own everywhere.
CREDENTIAL_ERRORS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound")


class RemoteUnavailableError(Exception):
    """The place of the second copy cannot be used now; the same command may work later."""


class RemoteDeniedError(RemoteUnavailableError):
    """Credentials are missing or do not suffice; that comes again until a person mends it."""


class LostOwnershipError(AlreadyRunningError):
    """A newer start of this run, maybe on another machine, copies to the same place."""


class Remote:
    """The second copy of one run at ``url``.

    Args:
        url: any URL of fsspec, such as ``s3://bucket/runs`` or ``file:///other/disk/runs``.
        name: of the run, whose place is then ``url/name``. Without it, ``url`` is the place.

    Raises:
        ValueError: the URL cannot be used; the message says why.
    """

    def __init__(self, url: str, name: str = "") -> None:
        check_url(url)
        base = url.rstrip("/")
        self.url = f"{base}/{name}" if name else base
        self.fs, self.root = connect(self.url)
        protocols = self.fs.protocol
        self.is_local = "file" in ((protocols,) if isinstance(protocols, str) else protocols)
        self.token = uuid.uuid4().hex
        self.started = time.time()
        if self.is_local:
            check_mounted(Path(connect(base)[1]) if name else Path(self.root).parent)

    # --- Reading

    def files(self, directory: str = "") -> dict[str, int]:
        """Return the sizes in bytes of all files below ``directory``, by their names.

        Raises:
            RemoteUnavailableError: they cannot be listed. An empty answer is never an error.
        """
        found: dict[str, int] = {}
        pending = [self._path(directory)]
        with self._available():
            self.fs.invalidate_cache()
            while pending:
                path = pending.pop()
                try:
                    entries = self.fs.ls(path, detail=True)
                except FileNotFoundError:
                    continue
                for entry in entries:
                    name = str(entry["name"]).rstrip("/")
                    if entry["type"] == "directory":
                        if name != path:
                            pending.append(name)
                    elif name != path:
                        found[name.removeprefix(self.root).lstrip("/")] = int(entry["size"] or 0)
        return found

    def steps(self) -> list[int]:
        """Return the steps whose checkpoint has its manifest there, in ascending order."""
        return sorted(steps_in(self.files(CHECKPOINTS), MANIFEST))

    def read(self, name: str) -> bytes:
        """Return the content of a small file.

        Raises:
            FileNotFoundError: it is not there.
            RemoteUnavailableError: it cannot be read.
        """
        with self._available():
            content: bytes = self.fs.cat_file(self._path(name))
            return content

    def chunks(self, name: str) -> Iterator[bytes]:
        """Yield the content of a file, a few MiB at a time; errors are those of ``read``."""
        with self._available(), self.fs.open(self._path(name), "rb", cache_type="none") as file:
            while chunk := file.read(CHUNK):
                yield chunk

    def score_file(self, step: int) -> bytes | None:
        """Return the ``score.json`` of ``step``, if it is there and whole."""
        try:
            content = self.read(f"{step_name(step)}/{SCORE}")
            score = json.loads(content)
            sha256 = score.pop("sha256")
            is_whole = sha256 == manifest_hash(score) and score["step"] == step
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return content if is_whole else None

    def score(self, step: int, metric: str) -> float | None:
        """Return the score of ``step`` in ``metric``, if it is there and whole."""
        content = self.score_file(step)
        score = json.loads(content) if content else {}
        return float(score["value"]) if score.get("metric") == metric else None

    # --- Writing

    def put(self, name: str, file: IO[bytes]) -> tuple[int, str]:
        """Copy an open file there under ``name``, read it back and compare.

        Returns:
            its size in bytes and its SHA-256.

        Raises:
            RemoteUnavailableError: it could not be written, or other bytes came back.
        """
        sent = hashlib.sha256()
        size = 0
        with self._available(writing=True), self._open_new(name) as target:
            while chunk := file.read(CHUNK):
                sent.update(chunk)
                size += len(chunk)
                target.write(chunk)
        found = hashlib.sha256()
        try:
            for chunk in self.chunks(name):
                found.update(chunk)
        except FileNotFoundError:
            raise RemoteUnavailableError(f"{name} was sent, and is not there") from None
        if found.digest() != sent.digest():
            with suppress(Exception):  # a damaged manifest must not stand for a checkpoint
                self.fs.rm_file(self._path(name))
            raise RemoteUnavailableError(f"{name} was sent, and other bytes came back")
        return size, sent.hexdigest()

    def delete(self, step: int) -> None:
        """Delete the checkpoint of ``step``, its manifest first."""
        path = self._path(step_name(step))
        with self._available():
            with suppress(FileNotFoundError):  # an interrupted upload has none
                self.fs.rm_file(f"{path}/{MANIFEST}")
            self.fs.invalidate_cache()
            with suppress(FileNotFoundError):
                self.fs.rm(path, recursive=True)

    def abandon_newer(self, after: int) -> list[int]:
        """Move the checkpoints newer than step ``after`` to ``abandoned/``, newest first.

        Returns:
            their steps.
        """
        files = self.files(CHECKPOINTS)
        newer = sorted((s for s in steps_in(files, MANIFEST) if s > after), reverse=True)
        if not newer:
            return []
        numbers = [PurePosixPath(name).parts[1] for name in self.files(ABANDONED)]
        number = max((int(n) for n in numbers if n.isdigit()), default=0) + 1
        for step in newer:
            source = step_name(step)
            for name in files:
                if name.startswith(f"{source}/"):
                    target = f"{ABANDONED}/{number:03}/{name.removeprefix(f'{CHECKPOINTS}/')}"
                    self._copy(name, target)
            self.delete(step)
        return newer

    # --- Ownership

    def owner(self) -> dict[str, Any]:
        """Return host, pid, token and time of the newest start that copied there.

        It is empty if there is none, or if it is damaged: a flipped bit must not stop a run.
        """
        try:
            owner: dict[str, Any] = json.loads(self.read(OWNER))
            return owner if owner.pop("sha256") == manifest_hash(owner) else {}
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def claim(self) -> dict[str, Any]:
        """Write that this process copies there now; return the owner before."""
        before = self.owner()
        owner = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "token": self.token,
            "time": self.started,
        }
        with self._available(writing=True), self._open_new(OWNER) as file:
            file.write(json.dumps(owner | {"sha256": manifest_hash(owner)}).encode())
        self.check_owner()
        return before

    def check_owner(self) -> None:
        """Check that no newer start copies there.

        Raises:
            LostOwnershipError: another one does; the message names it.
        """
        owner = self.owner()
        if owner and owner.get("token") != self.token:
            raise LostOwnershipError(
                f"{self.url} belongs to a newer start of this run: {describe_owner(owner)}. Only "
                f"one may train it; this one stops, and its checkpoints stay on its disk"
            )

    # --- Helpers

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    @contextmanager
    def _open_new(self, name: str) -> Iterator[Any]:
        """Open a file for writing that appears when the block ends; stores of objects do that."""
        path = self._path(name)
        if self.is_local:
            make_directory(Path(path).parent)
            with atomic_write(Path(path), unique=True) as file:
                yield file
        else:
            with self.fs.open(path, "wb") as file:
                yield file

    def _copy(self, source: str, target: str) -> None:
        with self._available(writing=True):
            if self.is_local:
                make_directory(Path(self._path(target)).parent)
            self.fs.cp_file(self._path(source), self._path(target))

    @contextmanager
    def _available(self, *, writing: bool = False) -> Iterator[None]:
        """Turn what the libraries raise for a network, a server or a disk into one error.

        Args:
            writing: what is missing is then the bucket, which is an error, too.
        """
        try:
            yield
        except Exception as error:
            is_answer = isinstance(error, FileNotFoundError) and not writing
            if is_answer or isinstance(error, RemoteUnavailableError):
                raise
            reason = f"{type(error).__name__}: {error}".rstrip(": ")
            kind = RemoteDeniedError if is_denial(error) else RemoteUnavailableError
            raise kind(f"{self.url} cannot be used: {reason}") from error


def is_denial(error: BaseException) -> bool:
    """Return whether ``error`` says that credentials are missing or not sufficient."""
    return isinstance(error, PermissionError) or type(error).__name__ in CREDENTIAL_ERRORS


def step_name(step: int) -> str:
    """Return the name of the directory of a checkpoint, below the run's."""
    return f"{CHECKPOINTS}/{step_dirname(step)}"


def describe_owner(owner: dict[str, Any]) -> str:
    """Return who an owner is, for people."""
    start = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner.get("time") or 0))
    return f"process {owner.get('pid')} on {owner.get('host')}, started {start}"


def steps_in(names: Iterable[str], file: str = "") -> set[int]:
    """Return the steps that have a directory among ``names``, or those with ``file`` in it."""
    found = set()
    for name in names:
        parts = PurePosixPath(name).parts
        match = STEP_DIRNAME.fullmatch(parts[1]) if len(parts) > 2 else None
        if match and file in ("", parts[2]):
            found.add(int(match[1]))
    return found
