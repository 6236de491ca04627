"""Read one checkpoint: verify every byte against its manifest, then load it.

    step-00000500/
        state.ckpt       weights, optimizer, step, position
        manifest.json    step, fingerprint, SHA-256 of each file
        part-*           of a sharded checkpoint: the tensors (see sharded.py)

``schema.py`` lists the entries. Loading is always ``weights_only=True``: no checkpoint can execute
code. Nothing here changes a file.
"""

import hashlib
import io
import json
import logging
import os
import re
import stat
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from exact_resume.checkpoint import schema
from exact_resume.checkpoint.integrity import (
    CheckpointLoadError,
    CorruptCheckpointError,
    NoValidCheckpointError,
    check_hash,
    check_size,
    classify_io_error,
)
from exact_resume.checkpoint.renames import rename_manifest, rename_state

log = logging.getLogger(__name__)

_DEVICE = str | torch.device
STATE = "state.ckpt"
MANIFEST = "manifest.json"
STEP_DIRNAME = re.compile(r"step-(\d{8,})")


def step_dirname(step: int) -> str:
    """Return the name of the directory of the checkpoint of ``step``."""
    return f"step-{step:08d}"


def read_checkpoint(
    directory: Path, name: str = STATE, map_location: Any = "cpu", *, whole: bool = True
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the manifest of a checkpoint, and the content of its file ``name``.

    Each file is read once: the bytes that are hashed are the bytes that are loaded. For a moment
    ``state.ckpt`` takes the memory of two copies; the parts of a sharded checkpoint do not.

    Args:
        directory: of the checkpoint.
        name: of one of its files.
        map_location: as of ``torch.load``.
        whole: whether to put together the tensors of a sharded checkpoint. Else they are on the
            device "meta", without bytes.

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
        check_size(directory / name, expected)
        content = (directory / name).read_bytes()
    except OSError as error:
        raise classify_io_error(name, error) from None
    check_hash(name, hashlib.sha256(content).hexdigest(), expected)
    state = _unpickle(content, directory / name, map_location)
    return manifest, _join(state, directory, map_location) if whole else state


def verify_checkpoint(directory: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint after checking every file against it.

    Raises:
        CorruptCheckpointError, NoValidCheckpointError, OSError: as ``read_checkpoint``.
    """
    manifest = parse_manifest(directory)
    for name, expected in manifest["files"].items():
        try:
            check_size(directory / name, expected)
            with (directory / name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise classify_io_error(name, error) from None
        check_hash(name, found, expected)
    return manifest


def load_state(path: Path, map_location: Any = "cpu", *, whole: bool = True) -> dict[str, Any]:
    """Return the content of a ``state.ckpt``, verified by the manifest beside it.

    A file without a manifest is loaded, too, with a warning that it is not verified.

    Args:
        path: of the ``state.ckpt``.
        map_location: as of ``torch.load``.
        whole: as of ``read_checkpoint``.

    Raises:
        CorruptCheckpointError: if it does not verify; nothing was loaded.
        CheckpointLoadError: if it holds more than tensors and primitives; nothing was executed.
    """
    if os.path.lexists(path.parent / MANIFEST):
        try:
            return read_checkpoint(path.parent, path.name, map_location, whole=whole)[1]
        except CorruptCheckpointError as reason:
            raise CorruptCheckpointError(f"{path} does not verify: {reason}") from None
    _warn_unverified(path)
    state = _unpickle(path.read_bytes(), path, map_location)
    return _join(state, path.parent, map_location) if whole else state


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


def manifest_hash(manifest: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a manifest or a score, without its own entry ``sha256``."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _unpickle(content: bytes, path: Path, map_location: Any) -> dict[str, Any]:
    """Load the bytes of a ``state.ckpt`` as tensors and primitives, under today's names."""
    try:
        state: dict[str, Any] = torch.load(
            io.BytesIO(content), map_location=map_location, weights_only=True
        )
        if schema.PARTS in state:
            schema.map_leaves(_note_path, state)
        return rename_state(state)
    except MemoryError:
        raise
    except Exception:  # a broken pickle can raise anything
        raise CheckpointLoadError(
            f"{path} is broken, or holds more than tensors and primitives and might run code"
        ) from None


def _note_path(path: str, value: Any) -> None:
    """Note under which path the parts have a tensor, before names change."""
    if isinstance(value, torch.Tensor) and value.is_meta:
        setattr(value, schema.STORED_PATH, path)


def _join(state: dict[str, Any], directory: Path, map_location: Any) -> dict[str, Any]:
    """Put together the tensors of a sharded checkpoint; another is returned as it is."""
    if schema.PARTS not in state:
        return state
    from exact_resume.checkpoint.resharding import join  # torch.distributed takes time to import

    return join(directory, state, map_location if isinstance(map_location, _DEVICE) else "cpu")


@cache  # warn once for each file
def _warn_unverified(path: Path) -> None:
    log.warning("%s has no %s beside it, so its bytes are not verified", path, MANIFEST)
