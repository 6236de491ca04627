"""A folder that is there only if it is complete and was read back.

It is written under a hidden name beside its place, and renamed. A kill leaves the hidden folder
alone, which the next export to the same place deletes.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from exact_resume.files import fsync, fsync_directory, lock_file, make_directory

LOCK = "lock"


class Unfinished:
    """The hidden folder of an export.

    Attributes:
        export: what becomes the folder.
        check: scratch for reading it back; it does not stay.
    """

    def __init__(self, hidden: Path) -> None:
        self.export = hidden / "export"
        self.check = hidden / "check"
        self.export.mkdir()
        self.check.mkdir()


@contextmanager
def new_folder(out: Path) -> Iterator[Unfinished]:
    """Make the folder ``out`` when the block ends without an error; else leave nothing.

    Raises:
        ValueError: ``out`` exists.
        OSError: it cannot be written.
    """
    check_free(out)
    make_directory(out.absolute().parent)
    prefix = f".{out.name}.export-"
    _delete_leftovers(out.absolute().parent, prefix)
    hidden = Path(tempfile.mkdtemp(prefix=prefix, dir=out.absolute().parent))
    try:
        with (hidden / LOCK).open("w") as lock:
            lock_file(lock)
            unfinished = Unfinished(hidden)
            yield unfinished
            sync_tree(unfinished.export)
            check_free(out)
            os.rename(unfinished.export, out)
            fsync_directory(out.absolute().parent)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def check_free(out: Path) -> None:
    """Raise ValueError if ``out`` is there."""
    if out.exists() or out.is_symlink():
        raise ValueError(f"out={out} is there already: give another folder, or delete it")


def sync_tree(folder: Path) -> None:
    """Make all files and names under ``folder`` durable; they become readable as new files are."""
    mask = os.umask(0)
    os.umask(mask)
    for parent, _, names in os.walk(folder):
        for name in names:
            with open(Path(parent, name), "rb") as file:
                os.fchmod(file.fileno(), 0o666 & ~mask)  # safetensors writes for the owner alone
                fsync(file.fileno())
        fsync_directory(Path(parent))


def _delete_leftovers(parent: Path, prefix: str) -> None:
    """Delete the hidden folders of exports that were killed; a live one holds its lock."""
    for leftover in parent.glob(f"{prefix}*"):
        try:
            with (leftover / LOCK).open("r+") as lock:
                is_dead = lock_file(lock)
        except OSError:
            continue  # not ours, or it has just begun
        if is_dead:
            shutil.rmtree(leftover, ignore_errors=True)
