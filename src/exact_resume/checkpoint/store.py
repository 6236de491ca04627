"""Durable, verified checkpoints: a directory ``step-00000500/`` is complete, or it is not there.

    write to a temporary directory -> sync each file -> manifest with SHA-256 -> sync -> rename
    -> sync the parent directory

A checkpoint is immutable; only its score, which is known after the next validation, is added
later. The newest checkpoint that verifies is "last". If one does not verify, the next older one is
used: the run that holds the lock moves the corrupt one to ``quarantine/``, with the reason; a
process that only reads leaves it where it is. Only tensors and primitives are written, and loading
is always ``weights_only=True``: no checkpoint can execute code.
"""

import errno
import hashlib
import io
import json
import logging
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from torch import Tensor

from exact_resume.checkpoint import schema
from exact_resume.checkpoint.renames import rename_manifest, rename_state
from exact_resume.files import atomic_write, fsync_directory, make_directory, open_durable

log = logging.getLogger(__name__)
T = TypeVar("T")

# A file that is gone or on bad sectors is damaged. After any other error it may be intact.
DAMAGE_ERRNOS = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO}
READER_ATTEMPTS = 10  # listings without a checkpoint before a reader believes that there is none
STATE = "state.ckpt"
MANIFEST = "manifest.json"
SCORE = "score.json"
QUARANTINE = "quarantine"
STEP_DIRNAME = re.compile(r"step-(\d{8,})")


class CorruptCheckpointError(ValueError):
    """A checkpoint does not verify; the message names the file and the reason."""


class CheckpointLoadError(ValueError):
    """A file cannot be loaded as tensors and primitives; nothing in it was executed."""


class NoValidCheckpointError(Exception):
    """There are checkpoints, but this version can use none of them."""


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


def step_dirname(step: int) -> str:
    """Return the name of the directory of the checkpoint of ``step``."""
    return f"step-{step:08d}"


class Store:
    """The checkpoints of one run.

    Args:
        directory: ``runs/NAME/checkpoints``; the first commit makes it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, valid or not, in ascending order.

        Files and directories with other names are ignored.
        """
        if not self.directory.is_dir():
            return []
        found = []
        for path in self.directory.iterdir():
            match = STEP_DIRNAME.fullmatch(path.name)
            if match and path.name == step_dirname(int(match[1])) and path.is_dir():
                found.append(int(match[1]))
        return sorted(found)

    def path(self, step: int) -> Path:
        """Return the directory of the checkpoint of ``step``."""
        return self.directory / step_dirname(step)

    def state(self, step: int) -> Path:
        """Return the path of the ``state.ckpt`` of ``step``."""
        return self.path(step) / STATE

    def commit(self, step: int, state: Mapping[str, Any], **metadata: Any) -> Path:
        """Write ``state`` durably as the checkpoint of ``step``.

        Args:
            step: optimizer steps done.
            state: the content of ``state.ckpt``.
            **metadata: further entries of the manifest.

        Returns:
            the directory of the checkpoint.

        Raises:
            TypeError: if ``state`` holds anything but tensors and primitives, naming it.
            FileExistsError: if the step has a checkpoint; checkpoints are immutable.
        """
        assert_primitive(state, "state")
        final = self.path(step)
        if final.exists():
            raise FileExistsError(f"{final} exists, and checkpoints are never overwritten")
        make_directory(self.directory)
        temporary = self.directory / f".{step_dirname(step)}.{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            with open_durable(temporary / STATE) as file:
                hashing = HashingWriter(file)
                torch.save(dict(state), hashing)  # type: ignore[arg-type]
            files = {STATE: {"bytes": hashing.size, "sha256": hashing.sha256.hexdigest()}}
            manifest = {"format": schema.FORMAT, "step": step, "files": files, "time": time.time()}
            manifest = json.loads(json.dumps(manifest | metadata))  # as it will be read again
            manifest |= {"sha256": manifest_hash(manifest)}
            with open_durable(temporary / MANIFEST) as file:
                file.write(json.dumps(manifest, indent=1).encode())
            fsync_directory(temporary)
            os.rename(temporary, final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)  # on a full disk this frees the space
            raise
        fsync_directory(self.directory)
        return final

    def verify(self, step: int) -> dict[str, Any]:
        """Return the manifest of ``step`` after checking every byte of the checkpoint against it.

        Raises:
            CorruptCheckpointError: with the file and the reason.
        """
        return verify_checkpoint(self.path(step))

    def manifest(self, step: int) -> dict[str, Any]:
        """Return the manifest of ``step``, without reading the files that it describes.

        Raises:
            CorruptCheckpointError: if the manifest itself does not verify.
        """
        return parse_manifest(self.path(step))

    def last(self, *, quarantine: bool = False) -> dict[str, Any] | None:
        """Return the manifest of the newest valid checkpoint; None if there is no checkpoint.

        Args:
            quarantine: whether to move corrupt checkpoints to ``quarantine/``. Only the run that
                holds the lock of the directory may do this. Else nothing is changed.

        Raises:
            NoValidCheckpointError: if there are checkpoints, here or in quarantine, but none is
                valid.
        """
        return self.first_valid(
            lambda: self.steps()[::-1], verify_checkpoint, quarantine=quarantine
        )

    def first_valid(
        self,
        order: Callable[[], Sequence[int]],
        read: Callable[[Path], T],
        *,
        quarantine: bool = False,
    ) -> T | None:
        """Return what ``read`` returns for the first valid checkpoint; None if there is none.

        Args:
            order: returns the steps in order of preference. It is called again after each failure,
                since a live run may have saved and deleted checkpoints meanwhile.
            read: ``verify_checkpoint`` or ``read_checkpoint``; called with a directory.
            quarantine: as in ``last``.

        Raises:
            NoValidCheckpointError: as in ``last``.
        """
        corrupt: set[int] = set()
        deleted: set[int] = set()
        attempts = 1 if quarantine or not self.directory.is_dir() else READER_ATTEMPTS
        while attempts:
            steps = [step for step in order() if step not in corrupt | deleted]
            if not steps:
                # A directory is not listed in one instant: while a live run saves and deletes, the
                # listing may be empty.
                attempts -= 1
                time.sleep(0.01 if attempts else 0)
                continue
            step = steps[0]
            try:
                return read(self.path(step))
            except CorruptCheckpointError as reason:
                if not self.path(step).exists():
                    deleted.add(step)  # by a live run, while this process was reading
                elif quarantine:
                    self._quarantine(step, str(reason))
                else:
                    corrupt.add(step)
                    log.warning(
                        "checkpoint %s does not verify (%s); trying the next one",
                        step_dirname(step),
                        reason,
                    )
        if not corrupt and not any((self.directory / QUARANTINE).glob("step-*")):
            return None
        message = f"no checkpoint in {self.directory} verifies"
        if not corrupt:
            message += f"; they were moved to its directory {QUARANTINE!r}, each with the reason"
        if quarantine:
            message += ". To start over, give the run a new directory"
        raise NoValidCheckpointError(message)

    def write_score(self, step: int, metric: str, value: float) -> None:
        """Write the score of the checkpoint of ``step`` durably beside it; it may be NaN.

        The score decides whether the checkpoint is deleted, so it must go wherever the checkpoint
        goes.
        """
        score = {"step": step, "metric": metric, "value": value}
        with atomic_write(self.path(step) / SCORE) as file:
            file.write(json.dumps(score | {"sha256": manifest_hash(score)}).encode())

    def scores(self, metric: str) -> dict[int, float]:
        """Return the scores in ``metric`` by step; without those that do not verify."""
        found = {}
        for step in self.steps():
            try:
                score = json.loads((self.path(step) / SCORE).read_bytes())
                expected = {"step": step, "metric": metric, "value": score["value"]}
                if score["sha256"] == manifest_hash(expected):
                    found[step] = float(score["value"])
            except (OSError, ValueError, KeyError, TypeError):
                continue
        return found

    def move_newer(self, after: int, to: Path) -> list[int]:
        """Move the checkpoints newer than step ``after`` to the directory ``to``.

        Returns:
            their steps, newest first.
        """
        newer = [step for step in reversed(self.steps()) if step > after]
        if newer:
            make_directory(to)
        for step in newer:  # newest first, so that a kill leaves no gap in the store
            os.rename(self.path(step), to / step_dirname(step))
            fsync_directory(to)
            fsync_directory(self.directory)
        return newer

    def prune(self, keep: set[int]) -> None:
        """Delete the checkpoints of all steps but ``keep``; the newest is never deleted."""
        for step in self.steps()[:-1]:
            if step not in keep:
                temporary = self.directory / f".pruned-{step_dirname(step)}"
                os.rename(self.path(step), temporary)  # a kill leaves no half-deleted checkpoint
                shutil.rmtree(temporary, ignore_errors=True)  # remove_stale_temp tries again

    def remove_stale_temp(self) -> None:
        """Remove the temporary files of killed processes, and make durable what these renamed.

        Only the run that holds the lock of the directory may call this.
        """
        if self.directory.is_dir():
            for stale in self.directory.glob(".*step-*"):
                shutil.rmtree(stale, ignore_errors=True)
            for stale in self.directory.glob(f"step-*/.{SCORE}"):
                stale.unlink(missing_ok=True)
            fsync_directory(self.directory)

    def _quarantine(self, step: int, reason: str) -> None:
        microseconds = int(time.time() * 1e6)
        target = self.directory / QUARANTINE / f"{step_dirname(step)}.{microseconds}"
        make_directory(target.parent)
        try:
            os.rename(self.path(step), target)
        except FileNotFoundError:
            return  # a live run deleted it while this process was reading
        with open_durable(target.with_name(f"{target.name}.reason.txt")) as file:
            file.write((reason + "\n").encode())
        log.warning(
            "checkpoint %s does not verify (%s); moved to %s", step_dirname(step), reason, target
        )


def read_checkpoint(
    directory: Path, name: str = STATE, map_location: Any = "cpu"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the manifest of a checkpoint, and the content of its file ``name``.

    The file is read once: the bytes that are hashed are the bytes that are loaded. For a moment
    this takes the memory of two copies.

    Args:
        directory: of the checkpoint.
        name: of one of its files.
        map_location: as of ``torch.load``.

    Raises:
        CorruptCheckpointError: with the file and the reason; nothing was loaded.
        NoValidCheckpointError: if a newer version wrote it.
        CheckpointLoadError: if it holds more than tensors and primitives.
        OSError: if it cannot be read, for a reason that says nothing about the checkpoint.
    """
    manifest = parse_manifest(directory)
    if name not in manifest["files"]:
        raise CorruptCheckpointError(f"{name} is not in its {MANIFEST}")
    expected = manifest["files"][name]
    try:
        _check_size(directory / name, expected)
        content = (directory / name).read_bytes()
    except OSError as error:
        raise classify_io_error(name, error) from None
    _check_hash(name, hashlib.sha256(content).hexdigest(), expected)
    return manifest, _unpickle(content, directory / name, map_location)


def verify_checkpoint(directory: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint after checking every file against it.

    Raises:
        CorruptCheckpointError, NoValidCheckpointError, OSError: as ``read_checkpoint``.
    """
    manifest = parse_manifest(directory)
    for name, expected in manifest["files"].items():
        try:
            _check_size(directory / name, expected)
            with (directory / name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise classify_io_error(name, error) from None
        _check_hash(name, found, expected)
    return manifest


def load_state(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Return the content of a ``state.ckpt``, verified by the manifest beside it.

    A file without a manifest is loaded, too, with a warning that it is not verified.

    Raises:
        CorruptCheckpointError: if it does not verify; nothing was loaded.
        CheckpointLoadError: if it holds more than tensors and primitives; nothing was executed.
    """
    if os.path.lexists(path.parent / MANIFEST):
        try:
            return read_checkpoint(path.parent, path.name, map_location)[1]
        except CorruptCheckpointError as reason:
            raise CorruptCheckpointError(f"{path} does not verify: {reason}") from None
    _warn_unverified(path)
    return _unpickle(path.read_bytes(), path, map_location)


def parse_manifest(directory: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint under today's names; the other files are not read.

    Raises:
        CorruptCheckpointError, NoValidCheckpointError, OSError: as ``read_checkpoint``.
    """
    try:
        if not stat.S_ISREG((directory / MANIFEST).stat().st_mode):  # a FIFO would block
            raise ValueError("it is no regular file")
        manifest = json.loads((directory / MANIFEST).read_bytes())
        if missing := schema.missing_entries(manifest, schema.MANIFEST_ENTRIES):
            raise ValueError(f"it has no {', '.join(missing)}")
        expected_hash = manifest.pop("sha256")
        newer = manifest["format"] > schema.FORMAT
        files = manifest["files"].values()
        if not all({"bytes", "sha256"} <= entry.keys() for entry in files):
            raise ValueError("its files have no size or hash")
    except OSError as error:
        raise classify_io_error(MANIFEST, error) from None
    except (ValueError, TypeError, AttributeError) as error:
        raise CorruptCheckpointError(f"{MANIFEST} cannot be read: {error}") from None
    if expected_hash != manifest_hash(manifest):
        raise CorruptCheckpointError(f"{MANIFEST} has changed since it was written")
    match = STEP_DIRNAME.fullmatch(directory.name)
    if match and int(match[1]) != manifest["step"]:
        raise CorruptCheckpointError(f"{MANIFEST} belongs to step {manifest['step']}")
    if newer:
        raise NoValidCheckpointError(
            f"{directory} has format {manifest['format']}, of a newer version; update the code"
        )
    return rename_manifest(manifest)


def assert_primitive(value: Any, where: str) -> None:
    """Check that ``value`` holds only tensors and primitives.

    Args:
        value: anything, at any depth of mappings, lists, tuples and sets.
        where: the name of ``value``, for the message.

    Raises:
        TypeError: naming the first value that is neither.
    """
    if isinstance(value, Mapping):
        for k, v in value.items():
            assert_primitive(k, f"a key of {where}")
            assert_primitive(v, f"{where}[{k!r}]")
    elif isinstance(value, list | tuple | set):
        for i, v in enumerate(value):
            assert_primitive(v, f"{where}[{i}]")
    elif not isinstance(value, Tensor | str | bytes | int | float | bool | None):
        raise TypeError(
            f"{where} is a {type(value).__qualname__}; checkpoints hold tensors and primitives only"
        )


def classify_io_error(name: str, error: OSError) -> Exception:
    """Return a CorruptCheckpointError if ``error`` means that the file is damaged, else ``error``.

    A file that is gone or on bad sectors is damaged. A missing permission or a network that is
    down says nothing about the file.
    """
    if error.errno in DAMAGE_ERRNOS:
        return CorruptCheckpointError(f"{name} cannot be read: {error.strerror}")
    return error


def manifest_hash(manifest: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a manifest or a score, without its own entry ``sha256``."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _check_size(path: Path, expected: Mapping[str, Any]) -> None:
    """Check the size of a file before it is read: a device or a FIFO might never end."""
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise CorruptCheckpointError(f"{path.name} has {size} bytes instead of {expected['bytes']}")


def _check_hash(name: str, found: str, expected: Mapping[str, Any]) -> None:
    if found != expected["sha256"]:
        raise CorruptCheckpointError(
            f"{name} has changed since it was written (its SHA-256 differs)"
        )


def _unpickle(content: bytes, path: Path, map_location: Any) -> dict[str, Any]:
    """Load the bytes of a ``state.ckpt`` as tensors and primitives, under today's names."""
    try:
        state: dict[str, Any] = torch.load(
            io.BytesIO(content), map_location=map_location, weights_only=True
        )
        return rename_state(state)
    except MemoryError:
        raise
    except Exception:  # a broken pickle can raise anything
        raise CheckpointLoadError(
            f"{path} is broken, or holds more than tensors and primitives and might run code"
        ) from None


@cache  # warn once for each file
def _warn_unverified(path: Path) -> None:
    log.warning("%s has no %s beside it, so its bytes are not verified", path, MANIFEST)
