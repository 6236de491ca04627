"""The small files of a run in its second copy: what is not a checkpoint, but belongs to the run.

``record.json`` has the size and SHA-256 of each. It is written after them, and before the manifest
of the next checkpoint: a fetched file is checked against it.
"""

import hashlib
import io
import json
import logging
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from exact_resume.checkpoint.reading import manifest_hash
from exact_resume.checkpoint.remote import Remote, RemoteUnavailableError
from exact_resume.files import atomic_write, make_directory

RECORD = "record.json"
TABLES = ("metrics.csv", "skips.jsonl", ".entered", "evaluations.csv")
FOLDERS = ("attempts", "samples", "ema")

log = logging.getLogger(__name__)


class RecordCopier:
    """Copies the small files of the run in ``home`` that have changed since the last time."""

    def __init__(self, remote: Remote, home: Path) -> None:
        self.remote = remote
        self.home = home
        self.index: dict[str, Any] | None = None  # what is there; None until it was read
        self.seen: dict[str, tuple[int, int]] = {}  # time and size of each file when it was copied

    def copy(self) -> None:
        """Copy what changed, then ``record.json``.

        Raises:
            RemoteUnavailableError: it cannot be copied now; call it again later.
        """
        if self.index is None:
            self.index = read_index(self.remote)
        changed = False
        for name in record_files(self.home):
            path = self.home / name
            try:
                stat = path.stat()
                signature = (stat.st_mtime_ns, stat.st_size)
                if self.seen.get(name) == signature:
                    continue
                with path.open("rb") as file:
                    here = hashlib.file_digest(file, "sha256").hexdigest()
                    if self.index.get(name, {}).get("sha256") != here:
                        file.seek(0)
                        size, sha256 = self.remote.put(name, file)
                        self.index[name] = {"bytes": size, "sha256": sha256}
                        changed = True
            except FileNotFoundError:
                continue  # training has moved it meanwhile
            self.seen[name] = signature
        if changed:
            content = {"files": self.index}
            text = json.dumps(content | {"sha256": manifest_hash(content)}, indent=1)
            self.remote.put(RECORD, io.BytesIO(text.encode()))


def record_files(home: Path) -> list[str]:
    """Return the names of the small files of the run in ``home``."""
    found = [name for name in TABLES if (home / name).is_file()]
    for folder in FOLDERS:
        for path in sorted((home / folder).rglob("*")):
            if path.is_file() and not path.name.startswith("."):
                found.append(path.relative_to(home).as_posix())
    return found


def read_index(remote: Remote) -> dict[str, Any]:
    """Return what ``record.json`` says by name; empty if it is not there or damaged."""
    try:
        index = json.loads(remote.read(RECORD))
        files: dict[str, Any] = index["files"]
        if index["sha256"] == manifest_hash({"files": files}):
            return files
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError):
        pass
    log.warning("%s in %s is damaged; it will be written anew", RECORD, remote.url)
    return {}


def fetch_record(remote: Remote, home: Path) -> None:
    """Write the small files of the second copy into ``home``, each atomically.

    Files of an attempt that are here already stay as they are.
    """
    index = read_index(remote)
    names = list(index) or list(TABLES)  # another tool may have made the copy
    for name in names:
        path = home / name
        if not is_record_name(name) or (name.startswith("attempts/") and path.exists()):
            continue
        try:
            content = _read_verified(remote, name, index.get(name))
        except FileNotFoundError:
            continue
        make_directory(path.parent)
        with atomic_write(path) as file:
            file.write(content)


def is_record_name(name: str) -> bool:
    """Return whether ``name`` is that of a small file of a run, and cannot lie elsewhere."""
    parts = PurePosixPath(name).parts
    if ".." in parts or fnmatch(name, "/*"):
        return False
    return name in TABLES or (len(parts) > 1 and parts[0] in FOLDERS)


def _read_verified(remote: Remote, name: str, expected: Mapping[str, Any] | None) -> bytes:
    """Return a file that agrees with ``expected``, or that reads the same twice.

    A copy that was interrupted before ``record.json`` leaves a file that is newer than it.
    """
    first = remote.read(name)
    if expected and hashlib.sha256(first).hexdigest() == expected["sha256"]:
        return first
    second = remote.read(name)
    if expected and hashlib.sha256(second).hexdigest() == expected["sha256"]:
        return second
    if first != second:
        raise RemoteUnavailableError(f"{remote.url}: {name} reads differently each time")
    if expected:
        log.warning(
            "%s in %s is not the one in its %s: it is newer, as after a kill, or it is damaged",
            name,
            remote.url,
            RECORD,
        )
    return first
