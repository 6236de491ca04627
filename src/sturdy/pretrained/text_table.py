"""The embeddings of captions in memory-mapped files, made once and then only read.

    embeddings.npy   float16 (rows + 1, tokens, d); the last row is the null caption
    pooled.npy       float16 (rows + 1, p); only where the encoder gives one vector of the text
    captions.json    the text of each row, in the order of the rows
    manifest.json    a description of these files, sealed by a hash

A table is written into another folder, which is renamed when it is complete: a kill at any instant
leaves a complete table or none.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from exact_resume.files import fsync_directory, open_durable
from sturdy.data.cache import lock_folder
from sturdy.data.cache_writer import DISK_FULL, seal
from sturdy.progress import ProgressPrinter

LAYOUT = 1  # of the files; raise it whenever they change
FOLDER = "captions"  # of all tables, in the folder of the caches

log = logging.getLogger(__name__)


class EncodedText(NamedTuple):
    """What the text encoders make of one caption.

    Attributes:
        embeddings: float16 ``(tokens, d)``.
        pooled: float16 ``(p,)``; None where there is none.
        is_cut: whether the caption had more tokens than the encoder reads.
    """

    embeddings: np.ndarray
    pooled: np.ndarray | None
    is_cut: bool


Encode = Callable[[str | None], EncodedText]
"""Encodes a text; None is the null caption of the encoders' family."""


class TextTable:
    """The embeddings of captions. All processes map the same memory.

    Args:
        path: a folder made by ``open_table``.

    Attributes:
        digest: a hash of the captions and of every byte of their embeddings.
        captions: the text of each row; the null caption is not among them.
        cut: the captions with more tokens than the encoder reads.
        embeddings: float16 ``(rows + 1, tokens, d)``.
        pooled: float16 ``(rows + 1, p)``, or None.

    Raises:
        ValueError, OSError: this is not a complete table.
    """

    def __init__(self, path: Path) -> None:
        manifest = read_manifest(path)
        self.path = path
        self.digest: str = manifest["digest"]
        self.cut: list[str] = manifest["cut"]
        self.captions: list[str] = json.loads((path / "captions.json").read_bytes())
        self.embeddings: np.ndarray = np.load(path / "embeddings.npy", mmap_mode="r")
        self.pooled: np.ndarray | None = None
        if "pooled.npy" in manifest["bytes"]:
            self.pooled = np.load(path / "pooled.npy", mmap_mode="r")

    def __len__(self) -> int:
        """Return the number of captions, which is also the row of the null caption."""
        return len(self.captions)

    def rows(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return embeddings ``(b, tokens, d)`` and pooled ``(b, p)``, float32 where ``index`` is.

        Args:
            index: ``(b,)`` int64 in [0, rows].
        """
        numbers = index.cpu().numpy()

        def gather(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array[numbers]).to(index.device).float()

        return gather(self.embeddings), None if self.pooled is None else gather(self.pooled)


def open_table(
    root: Path,
    captions: Sequence[str],
    *,
    null: str | None,
    encoder_key: str,
    make_encode: Callable[[], Encode],
) -> TextTable:
    """Open the table of ``captions`` under ``root``; make it if it is missing or damaged.

    Args:
        root: the folder of all caches.
        captions: the text of each row.
        null: the text of the last row; None for that of the encoders' family.
        encoder_key: a hash of everything that the embedding of a text depends on.
        make_encode: loads the encoders. It is called only if the table must be made.

    Raises:
        OSError: the disk is full (no file is left behind), or ``root`` cannot be written or locked.
    """
    depends = json.dumps([LAYOUT, encoder_key, null, list(captions)])
    name = hashlib.sha256(depends.encode()).hexdigest()[:32]
    path = Path(root).expanduser().absolute() / FOLDER / name
    table = _open_if_intact(path)
    if table is None:
        with lock_folder(path.with_suffix(".lock")):
            table = _open_if_intact(path)  # another process may have made it meanwhile
            if table is None:
                table = _make(path, captions, null, make_encode())
    return table


def find_table(root: Path, digest: str) -> TextTable | None:
    """Find the table with this ``digest`` under ``root``."""
    for manifest in sorted(Path(root).expanduser().absolute().glob(f"{FOLDER}/*/manifest.json")):
        path = manifest.parent
        if path.suffix:  # unfinished
            continue
        try:
            if read_manifest(path)["digest"] == digest:
                return TextTable(path)
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of the table in the folder ``path``.

    Raises:
        ValueError, OSError: it was changed, or a file is not as it says.
    """
    manifest: dict[str, Any] = json.loads((path / "manifest.json").read_bytes())
    if manifest.pop("seal", None) != seal(manifest):
        raise ValueError("manifest.json was changed")
    for name, size in manifest["bytes"].items():
        if (path / name).stat().st_size != size:
            raise ValueError(f"{name} is not of {size:,} bytes")
    return manifest


def _open_if_intact(path: Path) -> TextTable | None:
    if not path.exists():
        return None
    try:
        return TextTable(path)
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        log.warning("the table of captions %s is damaged and is made again: %s", path, error)
        return None


def _make(path: Path, captions: Sequence[str], null: str | None, encode: Encode) -> TextTable:
    unfinished = path.with_suffix(".building")
    for leftover in (unfinished, path):  # of a killed process; a damaged table
        if leftover.exists():
            shutil.rmtree(leftover)
    try:
        _write(unfinished, captions, null, encode)
        os.rename(unfinished, path)
        fsync_directory(path.parent)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        message = f"the disk is full: make room for the captions, or move cache={path.parents[1]}"
        raise OSError(error.errno, message) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return TextTable(path)


def _write(path: Path, captions: Sequence[str], null: str | None, encode: Encode) -> None:
    """Write the new folder ``path``, durably. Each caption is encoded alone."""
    texts = [*captions, null]
    digest = hashlib.sha256(json.dumps(texts).encode())
    cut = []
    path.mkdir()
    with ExitStack() as stack:
        progress = stack.enter_context(ProgressPrinter("encoding captions"))
        files: dict[str, Any] = {}

        def append(name: str, row: np.ndarray) -> None:
            if name not in files:
                files[name] = stack.enter_context(open_durable(path / name))
                shape = (len(texts), *row.shape)
                header = {"descr": "<f2", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(files[name], header)
            content = np.ascontiguousarray(row, dtype="<f2").tobytes()
            files[name].write(content)
            digest.update(content)

        for number, text in enumerate(texts):
            progress(number, len(texts))
            row = encode(text)
            append("embeddings.npy", row.embeddings)
            if row.pooled is not None:
                append("pooled.npy", row.pooled)
            if row.is_cut:
                cut.append(str(text))
        progress(len(texts), len(texts))
    with open_durable(path / "captions.json") as file:
        file.write(json.dumps(list(captions)).encode())
    manifest = {
        "cut": cut,
        "digest": digest.hexdigest(),
        "bytes": {file.name: file.stat().st_size for file in sorted(path.iterdir())},
    }
    with open_durable(path / "manifest.json") as file:
        file.write(json.dumps({**manifest, "seal": seal(manifest)}, indent=1).encode())
    fsync_directory(path)
