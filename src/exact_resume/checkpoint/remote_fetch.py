"""Fetch checkpoints from the second copy of a run into its store.

    download into a hidden directory -> verify against the manifest -> sync -> rename

This is the commit of the store, so a kill leaves nothing that looks like a checkpoint.
"""

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TypeVar

from exact_resume.checkpoint.reading import (
    MANIFEST,
    CorruptCheckpointError,
    parse_manifest,
    step_dirname,
    verify_checkpoint,
)
from exact_resume.checkpoint.remote import (
    Remote,
    RemoteDeniedError,
    RemoteUnavailableError,
    step_name,
)
from exact_resume.checkpoint.store import SCORE, Store
from exact_resume.files import fsync_directory, make_directory, open_durable

RETRY_DELAYS = (1.0, 2.0, 4.0, 8.0)  # seconds before each further attempt

log = logging.getLogger(__name__)
T = TypeVar("T")


def retry(action: Callable[[], T]) -> T:
    """Return what ``action`` returns; try again while the place cannot be used.

    Raises:
        RemoteUnavailableError: of the last attempt.
    """
    for delay in RETRY_DELAYS:
        try:
            return action()
        except RemoteDeniedError:
            raise
        except RemoteUnavailableError as error:
            log.warning("%s; trying again in %g s", error, delay)
            time.sleep(delay)
    return action()


@contextmanager
def downloaded(remote: Remote, step: int, store: Store) -> Iterator[Path]:
    """Yield a hidden directory with the verified checkpoint of ``step``.

    It moves into the store when the block ends without an error.

    Raises:
        CorruptCheckpointError: it does not verify, neither at a second download.
        NoValidCheckpointError: a newer version wrote it.
        RemoteUnavailableError: it cannot be read.
    """
    make_directory(store.directory)
    temporary = store.directory / f".{step_dirname(step)}.{os.getpid()}"
    try:
        try:
            retry(lambda: _download(remote, step, temporary))
        except CorruptCheckpointError as reason:  # the network may have changed a byte
            log.warning("%s of %s: %s; fetching it again", step_dirname(step), remote.url, reason)
            retry(lambda: _download(remote, step, temporary))
        yield temporary
        os.rename(temporary, store.path(step))
        fsync_directory(store.directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _download(remote: Remote, step: int, directory: Path) -> None:
    """Download the checkpoint of ``step`` into ``directory``, and verify it there.

    Raises:
        CorruptCheckpointError: it does not verify, or a file of it is missing.
    """
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    folders = {directory}

    def download(name: str) -> None:
        path = directory / name
        make_directory(path.parent)
        folders.add(path.parent)
        with open_durable(path) as file:
            for chunk in remote.chunks(f"{step_name(step)}/{name}"):
                file.write(chunk)

    try:
        download(MANIFEST)
        manifest = parse_manifest(directory)
        if manifest["step"] != step:
            raise CorruptCheckpointError(f"its {MANIFEST} belongs to step {manifest['step']}")
        for name in manifest["files"]:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise CorruptCheckpointError(f"its {MANIFEST} names {name}")
            download(name)
    except FileNotFoundError as error:
        raise CorruptCheckpointError(f"a file is missing: {error}") from None
    verify_checkpoint(directory)
    if score := remote.score_file(step) or remote.score_file(step):  # again: as for checkpoints
        with open_durable(directory / SCORE) as file:
            file.write(score)
    for folder in folders:
        fsync_directory(folder)


def fetch_step(
    remote: Remote, step: int, store: Store, before_commit: Callable[[], None] = lambda: None
) -> bool:
    """Fetch the checkpoint of ``step``; return False, with a line, if it does not verify.

    Args:
        remote: where it is.
        step: its step.
        store: where it goes.
        before_commit: called when it is verified, and before it is in the store.

    Raises:
        NoValidCheckpointError: a newer version wrote it.
        RemoteUnavailableError: it cannot be read.
    """
    try:
        with downloaded(remote, step, store):
            before_commit()
    except CorruptCheckpointError as reason:
        log.warning(
            "%s of the second copy in %s does not verify (%s); it is left out",
            step_dirname(step),
            remote.url,
            reason,
        )
        return False
    return True
