"""Durable, verified checkpoints: a directory ``step-00000500/`` is there whole and true, or it is
not there.

    write aside -> fsync each file -> manifest with SHA-256 -> fsync -> rename -> fsync the parent

A checkpoint is immutable; only its score, which is known after the next validation, is added beside
it. The newest one that verifies is "last". Where one does not verify, the next older one is used;
the run that holds the lock moves the broken one to ``quarantine/`` with its reason, and whoever
only reads leaves it where it is. Only tensors and primitives are ever written, and loading is
always ``weights_only=True``: no checkpoint can execute code.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from torch import Tensor

from exact_resume.checkpoint.schema import modern, modern_flat_config
from exact_resume.files import atomic_write, fsync_directory, make_directory, open_durable

log = logging.getLogger(__name__)
T = TypeVar("T")

DAMAGE_ERRNOS = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO}
FORMAT = 2
READER_ATTEMPTS = 10  # of a reader, before it believes that there is no checkpoint
STATE = "state.ckpt"
MANIFEST = "manifest.json"
SCORE = "score.json"
NAME = re.compile(r"step-(\d{8,})")


class CorruptCheckpointError(ValueError):
    """A checkpoint that does not verify; the message says what is wrong with which file."""


class CheckpointLoadError(ValueError):
    """A file that is broken, or holds more than tensors and primitives; nothing of it was
    executed.
    """


class NoValidCheckpointError(Exception):
    """There are checkpoints, and none that this version can use."""


class HashingWriter:
    """A file that hashes what is written, so that it is never read back to be summed."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.sha256, self.size = file, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        self.size += memoryview(data).nbytes
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def step_dirname(step: int) -> str:
    """The directory of a step's checkpoint."""
    return f"step-{step:08d}"


class Store:
    """The checkpoints of one run.

    Args:
        directory: ``runs/<name>/checkpoints``; made at the first commit.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending, verified or not; other names are none of
        ours.
        """
        if not self.directory.is_dir():
            return []
        names = [(int(m[1]), p) for p in self.directory.iterdir() if (m := NAME.fullmatch(p.name))]
        return sorted(step for step, p in names if p.name == step_dirname(step) and p.is_dir())

    def path(self, step: int) -> Path:
        """The directory of the checkpoint of ``step``."""
        return self.directory / step_dirname(step)

    def state(self, step: int) -> Path:
        """The ``state.ckpt`` of ``step``."""
        return self.path(step) / STATE

    def commit(self, step: int, state: Mapping[str, Any], **facts: Any) -> Path:
        """Write ``state`` durably as the checkpoint of ``step``; ``facts`` go into its manifest.

        Raises:
            TypeError: if anything in ``state`` is neither a tensor nor a primitive, naming it.
            FileExistsError: if the step has a checkpoint; checkpoints are immutable.
        """
        assert_primitive(state, "state")
        final = self.path(step)
        if final.exists():
            raise FileExistsError(f"{final} exists, and checkpoints are never overwritten")
        make_directory(self.directory)
        aside = self.directory / f".{step_dirname(step)}.{os.getpid()}"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        try:
            with open_durable(aside / STATE) as file:
                hashing = HashingWriter(file)
                torch.save(dict(state), hashing)  # type: ignore[arg-type]
            files = {STATE: {"bytes": hashing.size, "sha256": hashing.sha256.hexdigest()}}
            body = {"format": FORMAT, "step": step, "files": files, "time": time.time()} | facts
            manifest = json.loads(json.dumps(body))  # as it will be read again
            with open_durable(aside / MANIFEST) as file:
                file.write(
                    json.dumps(manifest | {"sha256": manifest_hash(manifest)}, indent=1).encode()
                )
            fsync_directory(aside)
            os.rename(aside, final)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)  # a full disk gets its room back
            raise
        fsync_directory(self.directory)
        return final

    def verify(self, step: int) -> dict[str, Any]:
        """The manifest of ``step``, after every byte of the checkpoint was checked against it.

        Raises:
            CorruptCheckpointError: with the file and the reason.
        """
        return read_manifest(self.path(step))

    def last(self, *, heal: bool = False) -> dict[str, Any] | None:
        """Return the manifest of the newest checkpoint that verifies; None if there is no
        checkpoint at all.

        Args:
            heal: move those that do not verify to ``quarantine/``. Only the one live run of the
                directory (see ``lock``) may do so; for all others nothing is changed.

        Raises:
            NoValidCheckpointError: if there were checkpoints (now or before, in quarantine) and
                none is left.
        """
        return self.first(lambda: self.steps()[::-1], self.verify, heal=heal)

    def first(
        self, order: Callable[[], Sequence[int]], read: Callable[[int], T], *, heal: bool = False
    ) -> T | None:
        """Return what ``read`` makes of the first checkpoint in ``order`` that verifies; None if
        there are none.

        Args:
            order: steps, the preferred one first; asked again after each failure, for a live run
                may have saved and pruned meanwhile.
            read: ``verify`` or ``read``.
            heal: as of ``last``.

        Raises:
            NoValidCheckpointError: as of ``last``.
        """
        broken: dict[int, str] = {}
        gone: set[int] = set()
        looks = 1 if heal or not self.directory.is_dir() else READER_ATTEMPTS
        while looks:
            steps = [step for step in order() if step not in broken.keys() | gone]
            if not steps:
                # a folder is not listed in one instant: while a live run saves and prunes, it may
                # look empty
                looks -= 1
                time.sleep(0.01 if looks else 0)
                continue
            step = steps[0]
            try:
                return read(step)
            except CorruptCheckpointError as reason:
                if not self.path(step).exists():
                    gone.add(step)  # a live run pruned it while this process was reading
                elif heal:
                    self._quarantine(step, str(reason))
                else:
                    broken[step] = str(reason)
                    log.warning(
                        "checkpoint %s does not verify (%s), and is passed over",
                        step_dirname(step),
                        reason,
                    )
        if broken or any((self.directory / "quarantine").glob("step-*")):
            where = (
                ""
                if broken
                else "; the broken ones are in its folder 'quarantine', each with a reason"
            )
            advice = ". To start over, give the run a new name (name=...)" if heal else ""
            raise NoValidCheckpointError(
                f"no checkpoint in {self.directory} verifies{where}{advice}"
            )
        return None

    def read(self, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the manifest and the state of ``step``, as of ``read_checkpoint``."""
        return read_checkpoint(self.path(step))

    def manifest(self, step: int) -> dict[str, Any]:
        """Return the manifest of ``step`` without a look at the files that it vouches for.

        Raises:
            CorruptCheckpointError: if the manifest does not verify.
        """
        return _sealed(self.path(step))

    def keep_score(self, step: int, metric: str, value: float) -> None:
        """Write durably beside the checkpoint of ``step`` what a validation said of it; ``value``
        may be NaN.

        It is what decides whether the checkpoint is deleted, so it goes wherever the checkpoint
        goes.
        """
        score = {"step": step, "metric": metric, "value": value}
        with atomic_write(self.path(step) / SCORE) as file:
            file.write(json.dumps(score | {"sha256": manifest_hash(score)}).encode())

    def scores(self, metric: str) -> dict[int, float]:
        """Return the scores in ``metric`` by step, NaN where it was no number; broken ones are left
        out.
        """
        found = {}
        for step in self.steps():
            try:
                score = json.loads((self.path(step) / SCORE).read_bytes())
                if score.pop("sha256") == manifest_hash(score) and (
                    score["step"],
                    score["metric"],
                ) == (step, metric):
                    found[step] = float(score["value"])
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                continue
        return found

    def abandon(self, after: int, to: Path) -> list[int]:
        """Move the checkpoints newer than ``after`` to the directory ``to``, newest first; returns
        their steps.
        """
        newer = [step for step in reversed(self.steps()) if step > after]
        if newer:
            make_directory(to)
        for step in (
            newer
        ):  # newest first: a kill in between leaves the beginning of the branch, not a hole
            os.rename(self.path(step), to / step_dirname(step))
            fsync_directory(to)
            fsync_directory(self.directory)
        return newer

    def prune(self, keep: set[int]) -> None:
        """Delete the checkpoints of all steps but ``keep``; the newest is never deleted."""
        for step in self.steps()[:-1]:
            if step not in keep:
                aside = self.directory / f".pruned-{step_dirname(step)}"
                os.rename(
                    self.path(step), aside
                )  # so that a kill leaves no half-deleted checkpoint
                shutil.rmtree(
                    aside, ignore_errors=True
                )  # what cannot be deleted now, `sweep` tries again

    def sweep(self) -> None:
        """Remove what killed writers left, and make durable what they had no time to.

        Only the one live run of the directory (see ``lock``) may call it.
        """
        if self.directory.is_dir():
            for stray in self.directory.glob(".*step-*"):
                shutil.rmtree(stray, ignore_errors=True)
            for stray in self.directory.glob(f"step-*/.{SCORE}"):
                stray.unlink(missing_ok=True)
            fsync_directory(self.directory)

    def _quarantine(self, step: int, reason: str) -> None:
        there = self.directory / "quarantine" / f"{step_dirname(step)}.{int(time.time() * 1e6)}"
        make_directory(there.parent)
        try:
            os.rename(self.path(step), there)
        except FileNotFoundError:
            return  # a live run pruned it while this process was reading
        with open_durable(there.with_name(there.name + ".reason.txt")) as file:
            file.write((reason + "\n").encode())
        log.warning(
            "checkpoint %s does not verify (%s); moved to %s", step_dirname(step), reason, there
        )


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of the checkpoint ``directory``, after every file was checked against it.

    Raises:
        CorruptCheckpointError: with the file and the reason.
        NoValidCheckpointError: if a newer version wrote it.
        OSError: if it cannot be read for a reason that says nothing about the checkpoint.
    """
    manifest = _sealed(directory)
    for name, entry in manifest["files"].items():
        with _opened(directory / name, entry["bytes"]) as file:
            _compare(name, hashlib.file_digest(file, "sha256").hexdigest(), entry["sha256"])
    return manifest


def read_checkpoint(
    directory: Path, name: str = STATE, map_location: Any = "cpu"
) -> tuple[dict[str, Any], Any]:
    """Return the manifest of the checkpoint ``directory`` and what is in its file ``name``.

    The file is read once, and what was summed is what is loaded; for a moment that takes the memory
    of two copies.

    Raises:
        CorruptCheckpointError, NoValidCheckpointError, OSError: as of ``read_manifest``.
        CheckpointLoadError: as of ``load_state``.
    """
    manifest = _sealed(directory)
    if name not in manifest["files"]:
        raise CorruptCheckpointError(f"{name} is not in its {MANIFEST}")
    entry = manifest["files"][name]
    with _opened(directory / name, entry["bytes"]) as file:
        content = file.read()
    _compare(name, hashlib.sha256(content).hexdigest(), entry["sha256"])
    return manifest, _loaded(content, directory / name, map_location)


def load_state(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Load a ``state.ckpt`` as tensors and primitives, verified by the manifest beside it.

    A file that lies somewhere without a manifest is loaded, too; a line says that nothing vouches
    for it.

    Raises:
        CorruptCheckpointError: if it is not what the manifest vouches for; nothing was loaded.
        CheckpointLoadError: if the file is broken, or holds anything else; such a pickle is refused
            unexecuted.
    """
    if os.path.lexists(path.parent / MANIFEST):
        try:
            return read_checkpoint(path.parent, path.name, map_location)[1]
        except CorruptCheckpointError as reason:
            raise CorruptCheckpointError(f"{path} does not verify: {reason}") from None
    _say_unverified(path)
    return _loaded(path.read_bytes(), path, map_location)


@cache  # once is enough
def _say_unverified(path: Path) -> None:
    log.warning("%s has no %s beside it, so its bytes are not verified", path, MANIFEST)


def _loaded(content: bytes, path: Path, map_location: Any) -> Any:
    """Load ``content``, under today's names (see ``renamed``)."""
    try:
        return modern(
            torch.load(io.BytesIO(content), map_location=map_location, weights_only=True), FORMAT
        )
    except MemoryError:
        raise
    except Exception:  # a broken pickle raises whatever it likes
        raise CheckpointLoadError(
            f"{path} is broken, or holds more than tensors and primitives and might run code"
        ) from None


def _sealed(directory: Path) -> dict[str, Any]:
    """The manifest of ``directory`` if it is as it was written; the files are not looked at."""
    try:
        if not stat.S_ISREG((directory / MANIFEST).stat().st_mode):
            raise CorruptCheckpointError(
                f"{MANIFEST} cannot be read: it is no regular file"
            )  # a FIFO would be waited for
        manifest = json.loads((directory / MANIFEST).read_bytes())
        seal = manifest.pop("sha256")
        _ = [(entry["bytes"], entry["sha256"]) for entry in manifest["files"].values()]
        newer, step = manifest["format"] > FORMAT, manifest["step"]
    except CorruptCheckpointError:
        raise
    except OSError as error:
        raise classify_io_error(MANIFEST, error) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptCheckpointError(f"{MANIFEST} cannot be read: {error!r}") from None
    if seal != manifest_hash(manifest):
        raise CorruptCheckpointError(f"{MANIFEST} has changed since it was written")
    if (name := NAME.fullmatch(directory.name)) and int(name[1]) != step:
        raise CorruptCheckpointError(f"{MANIFEST} belongs to step {step}")
    if newer:
        raise NoValidCheckpointError(
            f"{directory} has format {manifest['format']}, of a newer version; update the code"
        )
    return _modern_manifest(manifest)


def _modern_manifest(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest whose fingerprint has today's names."""
    then = manifest.get("fingerprint")
    if not isinstance(then, dict) or manifest["format"] == FORMAT:
        return manifest
    config = modern_flat_config(then.get("config", {}), manifest["format"], FORMAT)
    return manifest | {"fingerprint": then | {"config": config}}


@contextmanager
def _opened(path: Path, size: int) -> Iterator[Any]:
    """The file at ``path``, which must have ``size`` bytes; what goes wrong with reading it is
    damage.
    """
    try:
        if (found := path.stat().st_size) != size:
            raise CorruptCheckpointError(f"{path.name} has {found} bytes instead of {size}")
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise classify_io_error(path.name, error) from None


def _compare(name: str, found: str, expected: str) -> None:
    if found != expected:
        raise CorruptCheckpointError(
            f"{name} has changed since it was written (its SHA-256 differs)"
        )


def assert_primitive(value: Any, where: str) -> None:
    """Raise a TypeError that names the first thing under ``value`` which is neither tensor nor
    primitive.
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
    """A file that is gone or has bad sectors is damage; no permission or a network that is away is
    not.
    """
    return (
        CorruptCheckpointError(f"{name} cannot be read: {error.strerror}")
        if error.errno in DAMAGE_ERRNOS
        else error
    )


def manifest_hash(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
