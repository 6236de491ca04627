"""Durable, verified checkpoints: a directory ``step-00000500/`` is there whole and true, or it is not there.

    write aside -> fsync each file -> manifest with SHA-256 -> fsync -> rename -> fsync the parent

A checkpoint is immutable. The newest one that verifies is "last"; one that does not verify is moved to
``quarantine/`` with its reason, and the next older one is used. Only tensors and primitives are ever written, and
loading is always ``weights_only=True``: no checkpoint can execute code.
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sturdy.resume.durable import durable, fsync_directory, make_directory
from sturdy.resume.renamed import modern

log = logging.getLogger(__name__)

DAMAGE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO}
FORMAT = 1
STATE = "state.ckpt"
MANIFEST = "manifest.json"
NAME = re.compile(r"step-(\d{8,})")


class Corrupt(Exception):
    """A checkpoint that does not verify; the message says what is wrong with which file."""


class Unloadable(ValueError):
    """A file that is broken, or holds more than tensors and primitives; nothing of it was executed."""


class NothingVerifies(Exception):
    """There are checkpoints, and none that this version can use."""


def name_of(step: int) -> str:
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
        """Steps that have a checkpoint, ascending, verified or not; other names are none of ours."""
        if not self.directory.is_dir():
            return []
        names = [(int(m[1]), p) for p in self.directory.iterdir() if (m := NAME.fullmatch(p.name))]
        return sorted(step for step, p in names if p.name == name_of(step) and p.is_dir())

    def path(self, step: int) -> Path:
        """The directory of the checkpoint of ``step``."""
        return self.directory / name_of(step)

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
        aside = self.directory / f".{name_of(step)}.{os.getpid()}"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        try:
            with durable(aside / STATE) as file:
                torch.save(dict(state), file)  # type: ignore[arg-type]
            files = {STATE: {"bytes": file.size, "sha256": file.sha256.hexdigest()}}
            body = {"format": FORMAT, "step": step, "files": files, "time": time.time()} | facts
            manifest = json.loads(json.dumps(body))  # as it will be read again
            with durable(aside / MANIFEST) as file:
                file.write(json.dumps(manifest | {"sha256": _seal(manifest)}, indent=1).encode())
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
            Corrupt: with the file and the reason.
        """
        return read_manifest(self.path(step))

    def last(self) -> dict[str, Any] | None:
        """The manifest of the newest checkpoint that verifies; None if there is no checkpoint at all.

        Those that do not verify are moved to ``quarantine/``, loudly.

        Raises:
            NothingVerifies: if there were checkpoints (now or before, in quarantine) and none is left.
        """
        for step in reversed(self.steps()):
            try:
                return self.verify(step)
            except Corrupt as reason:
                self._quarantine(step, str(reason))
        if any((self.directory / "quarantine").glob("step-*")):
            raise NothingVerifies(
                f"no checkpoint in {self.directory} verifies; the broken ones are in its folder 'quarantine', "
                f"each with a reason. To start over, give the run a new name (name=...)"
            )
        return None

    def abandon(self, after: int, to: Path) -> list[int]:
        """Move the checkpoints newer than ``after`` to the directory ``to``, newest first; returns their steps."""
        newer = [step for step in reversed(self.steps()) if step > after]
        if newer:
            make_directory(to)
        for step in newer:  # newest first: a kill in between leaves the beginning of the branch, not a hole
            os.rename(self.path(step), to / name_of(step))
            fsync_directory(to)
            fsync_directory(self.directory)
        return newer

    def prune(self, keep: set[int]) -> None:
        """Delete the checkpoints of all steps but ``keep``; the newest is never deleted."""
        for step in self.steps()[:-1]:
            if step not in keep:
                aside = self.directory / f".pruned-{name_of(step)}"
                os.rename(self.path(step), aside)  # so that a kill leaves no half-deleted checkpoint
                shutil.rmtree(aside, ignore_errors=True)  # what cannot be deleted now, `sweep` tries again

    def sweep(self) -> None:
        """Remove what killed writers left, and make durable what they had no time to.

        Only the one live run of the directory (see ``lock``) may call it.
        """
        if self.directory.is_dir():
            for stray in self.directory.glob(".*step-*"):
                shutil.rmtree(stray, ignore_errors=True)
            fsync_directory(self.directory)

    def _quarantine(self, step: int, reason: str) -> None:
        there = self.directory / "quarantine" / f"{name_of(step)}.{int(time.time() * 1e6)}"
        make_directory(there.parent)
        try:
            os.rename(self.path(step), there)
        except FileNotFoundError:
            return  # a live run pruned it while this process was reading
        with durable(there.with_name(there.name + ".reason.txt")) as file:
            file.write((reason + "\n").encode())
        log.warning("checkpoint %s does not verify (%s); moved to %s", name_of(step), reason, there)


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of the checkpoint ``directory``, after every file was checked against it.

    Raises:
        Corrupt: with the file and the reason.
        NothingVerifies: if a newer version wrote it.
        OSError: if it cannot be read for a reason that says nothing about the checkpoint.
    """
    try:
        if not stat.S_ISREG((directory / MANIFEST).stat().st_mode):
            raise Corrupt(f"{MANIFEST} cannot be read: it is no regular file")  # a FIFO would be waited for
        manifest = json.loads((directory / MANIFEST).read_bytes())
        seal = manifest.pop("sha256")
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        newer, step = manifest["format"] > FORMAT, manifest["step"]
    except OSError as error:
        raise _verdict(MANIFEST, error) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Corrupt(f"{MANIFEST} cannot be read: {error!r}") from None
    if seal != _seal(manifest):
        raise Corrupt(f"{MANIFEST} has changed since it was written")
    if (name := NAME.fullmatch(directory.name)) and int(name[1]) != step:
        raise Corrupt(f"{MANIFEST} belongs to step {step}")
    if newer:
        raise NothingVerifies(f"{directory} has format {manifest['format']}, of a newer version; update sturdy")
    for name, (size, sha256) in files.items():
        try:
            found = (directory / name).stat().st_size
            if found != size:
                raise Corrupt(f"{name} has {found} bytes instead of {size}")
            with (directory / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    raise Corrupt(f"{name} has changed since it was written (its SHA-256 differs)")
        except OSError as error:
            raise _verdict(name, error) from None
    return manifest


def load_state(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """A ``state.ckpt`` as tensors and primitives, under today's names (see ``renamed``).

    Raises:
        Unloadable: if the file is broken, or holds anything else; such a pickle is refused unexecuted.
    """
    try:
        return modern(torch.load(path, map_location=map_location, weights_only=True), FORMAT)
    except (OSError, MemoryError):
        raise
    except Exception:  # a broken pickle raises whatever it likes
        raise Unloadable(f"{path} is broken, or holds more than tensors and primitives and might run code") from None


def assert_primitive(value: Any, where: str) -> None:
    """Raise a TypeError that names the first thing under ``value`` which is neither tensor nor primitive."""
    if isinstance(value, Mapping):
        for k, v in value.items():
            assert_primitive(k, f"a key of {where}")
            assert_primitive(v, f"{where}[{k!r}]")
    elif isinstance(value, list | tuple | set):
        for i, v in enumerate(value):
            assert_primitive(v, f"{where}[{i}]")
    elif not isinstance(value, Tensor | str | bytes | int | float | bool | None):
        raise TypeError(f"{where} is a {type(value).__qualname__}; checkpoints hold tensors and primitives only")


def _verdict(name: str, error: OSError) -> Exception:
    """A file that is gone or has bad sectors is damage; no permission or a network that is away is not."""
    return Corrupt(f"{name} cannot be read: {error.strerror}") if error.errno in DAMAGE else error


def _seal(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
