"""Durable, verified checkpoints: a directory ``step-00000500/`` is complete, or it is not there.

    write to a temporary directory -> sync each file -> manifest with SHA-256 -> sync -> rename
    -> sync the parent directory

A checkpoint is immutable; only its score, which is known after the next validation, is added
later. The newest checkpoint that verifies is "last". If one does not verify, the next older one is
used: the run that holds the lock moves the corrupt one to ``quarantine/``, with the reason; a
process that only reads leaves it where it is.
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from exact_resume.checkpoint.integrity import (
    CheckpointLoadError,
    CorruptCheckpointError,
    NoValidCheckpointError,
)
from exact_resume.checkpoint.reading import (
    MANIFEST,
    STATE,
    STEP_DIRNAME,
    load_state,
    manifest_hash,
    parse_manifest,
    read_checkpoint,
    step_dirname,
    verify_checkpoint,
)
from exact_resume.checkpoint.schema import FORMAT, assert_primitive
from exact_resume.files import (
    HashingWriter,
    atomic_write,
    fsync_directory,
    make_directory,
    open_durable,
)

__all__ = [
    "FORMAT",
    "MANIFEST",
    "QUARANTINE",
    "SCORE",
    "STATE",
    "CheckpointLoadError",
    "CorruptCheckpointError",
    "NoValidCheckpointError",
    "Store",
    "assert_primitive",
    "load_state",
    "manifest_hash",
    "read_checkpoint",
    "step_dirname",
    "verify_checkpoint",
]

log = logging.getLogger(__name__)
T = TypeVar("T")

READER_ATTEMPTS = 10  # listings without a checkpoint before a reader believes that there is none
SCORE = "score.json"
QUARANTINE = "quarantine"


class Store:
    """The checkpoints of one run.

    Args:
        directory: ``runs/NAME/checkpoints``; the first commit makes it.
        check: called just before a checkpoint appears; an error of it keeps the checkpoint out.
    """

    def __init__(self, directory: Path, check: Callable[[], None] = lambda: None) -> None:
        self.directory = Path(directory)
        self.check = check

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
        temporary = self.stage(step, str(os.getpid()))
        try:
            return self.publish(step, temporary, state, {}, **metadata)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)  # on a full disk this frees the space
            raise

    def stage(self, step: int, name: str) -> Path:
        """Make the temporary directory of the checkpoint of ``step``.

        Args:
            step: optimizer steps done.
            name: tells it from those of other processes.

        Raises:
            FileExistsError: as ``commit``.
        """
        final = self.path(step)
        if final.exists():
            raise FileExistsError(f"{final} exists, and checkpoints are never overwritten")
        make_directory(self.directory)
        temporary = self.directory / f".{step_dirname(step)}.{name}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        return temporary

    def publish(
        self,
        step: int,
        temporary: Path,
        state: Mapping[str, Any],
        files: Mapping[str, Mapping[str, Any]],
        **metadata: Any,
    ) -> Path:
        """Add ``state.ckpt`` and the manifest to ``temporary``, and make it the checkpoint.

        Args:
            step: optimizer steps done.
            temporary: of ``stage``.
            state: the content of ``state.ckpt``.
            files: bytes and SHA-256 of the files that ``temporary`` has already, which are durable.
            **metadata: further entries of the manifest.

        Returns:
            the directory of the checkpoint.
        """
        with open_durable(temporary / STATE) as file:
            hashing = HashingWriter(file)
            torch.save(dict(state), hashing)  # type: ignore[arg-type]
        own = {STATE: {"bytes": hashing.size, "sha256": hashing.sha256.hexdigest()}}
        manifest = {"format": FORMAT, "step": step, "files": {**own, **files}, "time": time.time()}
        manifest = json.loads(json.dumps(manifest | metadata))  # as it will be read again
        manifest |= {"sha256": manifest_hash(manifest)}
        with open_durable(temporary / MANIFEST) as file:
            file.write(json.dumps(manifest, indent=1).encode())
        fsync_directory(temporary)
        self.check()
        os.rename(temporary, self.path(step))
        fsync_directory(self.directory)
        return self.path(step)

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
