"""Decoded images in one memory-mapped file, made once from a source and then only read.

    cache[source.key] = [decode(0), decode(1), ...] without the broken ones

It is written aside and renamed when whole: a kill at any instant leaves either a whole cache or none. Its
``digest`` hashes the content alone, so that equal images have equal digests wherever they lie.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from sturdy.data.build import build, seal, sync
from sturdy.data.source import Source

LAYOUT = 2  # of the files that ``build`` writes; raise it whenever they change

log = logging.getLogger(__name__)


class TooManyBroken(ValueError):
    """More of the images are broken than the run accepts to do without."""


class Damaged(Exception):
    """What is on the disk is not a whole cache."""


class Cache:
    """The decoded images of a source. It pickles as its path, and every process maps the same memory.

    Args:
        path: a folder made by ``open_cache``.

    Raises:
        Damaged: a file is missing, cut short or not what the manifest says.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            manifest = _read_manifest(self.path)
            self.key: str = manifest["key"]
            self.classes: tuple[str, ...] = tuple(manifest["classes"])
            self.digest: str = manifest["digest"]
            self.quarantine: list[tuple[str, str]] = [(name, why) for name, why in manifest["quarantine"]]
            self.small: list[str] = manifest.get("small", [])  # names of images left out because of their size
            self.remarks: list[str] = manifest.get("remarks", [])  # what is odd about the images, a line each
            self.labels: np.ndarray = np.load(self.path / "labels.npy")  # (n,) int64
            self.shapes: np.ndarray = np.load(self.path / "shapes.npy")  # (n, 2) int64, heights and widths
            pixels = np.memmap(self.path / "images.bin", dtype=np.uint8, mode="r").view(np.ndarray)
        except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError) as error:
            raise Damaged(f"{self.path}: {error}") from error
        self.labels.flags.writeable = self.shapes.flags.writeable = False
        self.uniform = bool((self.shapes == self.shapes[0]).all())
        self._names: list[str] | None = None
        if self.uniform:
            self._images = pixels.reshape(-1, 3, *self.shapes[0])
        else:
            self._pixels = pixels
            self._ends = np.concatenate([[0], np.cumsum(3 * self.shapes.prod(axis=1))])

    def __len__(self) -> int:
        return len(self.labels)

    def __reduce__(self) -> tuple[type["Cache"], tuple[Path]]:
        return Cache, (self.path,)

    def name(self, index: int) -> str:
        """What to call the image in messages and tables."""
        if self._names is None:
            self._names = json.loads((self.path / "names.json").read_bytes())
        return self._names[index]

    def image(self, index: int) -> np.ndarray:
        """One image, uint8 ``(3, h, w)``, a read-only view of the memory map."""
        if self.uniform:
            return self._images[index]
        index = range(len(self))[index]
        return self._pixels[self._ends[index] : self._ends[index + 1]].reshape(3, *self.shapes[index])

    def gather(self, indices: np.ndarray) -> np.ndarray:
        """A batch, uint8 ``(b, 3, h, w)``, copied; only where all images have one shape (see ``uniform``)."""
        if not self.uniform:
            raise ValueError("images of different shapes make no batch: crop each `image(index)` first")
        return self._images[indices]

    def report(self, most: int = 10) -> str:
        """Which images were left out and why, in plain text: the first ``most``, and where all are listed."""
        broken = self.quarantine
        if not broken:
            return ""
        heading = f"{len(broken):,} of {len(self) + len(broken):,} images are left out"
        where = f"; the first {most} are below, all in {self.path / 'quarantine.txt'}" if len(broken) > most else ""
        return f"{heading}{where}:\n{_table(broken, most)}"


def open_cache(
    source: Source,
    *,
    root: str | os.PathLike[str],
    max_broken: float = 0.01,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Cache:
    """The cache of ``source`` under ``root``; made if it is not there, or damaged.

    Args:
        source: what to decode, in its order.
        root: the folder of all caches.
        max_broken: most broken images to do without: a share from 0 to 1, or their number, an ``int`` from 1 on.
        workers: threads that decode, 0 for none but the caller's, ``None`` for one a CPU. Decoders let go of
            Python's lock, and threads cannot outlive the process. The bytes are the same at any number.
        progress: told ``(done, total)`` now and then.

    Raises:
        TooManyBroken: the share is larger, or no image is left.
        ValueError: the source has no images.
        OSError: the disk is full (nothing is left behind), or cannot be locked.
    """
    total = len(source)
    if total == 0:
        raise ValueError("the source has no images")
    root = Path(root).expanduser().absolute()
    stem = hashlib.sha256(f"{LAYOUT} {source.key}".encode()).hexdigest()[:32]
    path, aside = root / stem, root / f"{stem}.building"
    cache = _existing(path, source.key)
    if cache is None:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / f"{stem}.lock"):
            cache = _existing(path, source.key)  # another process may have made it while this one waited
            if cache is None:
                for remains in (aside, path):  # of a build that was killed; of a damaged cache
                    if remains.exists():
                        shutil.rmtree(remains)
                try:
                    broken = build(source, aside, workers=workers, progress=progress)
                    if len(broken) == total:
                        raise TooManyBroken(f"all {total:,} images are broken:\n{_table(broken)}")
                    os.rename(aside, path)
                    sync(root)
                finally:
                    shutil.rmtree(aside, ignore_errors=True)
                cache = Cache(path)
    most = max_broken if isinstance(max_broken, int) else max_broken * total
    if len(cache.quarantine) > most:  # it stays, for a run that accepts more
        share = len(cache.quarantine) / total
        raise TooManyBroken(
            f"{share:.2%} of the images are broken, more than data.max_broken={max_broken} accepts: {cache.report()}\n"
            f"Repair or remove them, or accept so many with data.max_broken={len(cache.quarantine)}."
        )
    return cache


def _table(broken: list[tuple[str, str]], most: int = 10) -> str:
    width = max(len(name) for name, _ in broken[:most])
    return "\n".join(f"  {name:<{width}}  {reason}" for name, reason in broken[:most])


def _existing(path: Path, key: str) -> Cache | None:
    if not path.exists():
        return None
    try:
        cache = Cache(path)
    except Damaged as damage:
        log.warning("the cache is damaged and is made again: %s", damage)
        return None
    return cache if cache.key == key else None


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest = json.loads((path / "manifest.json").read_bytes())
    if manifest.pop("seal") != seal(manifest):
        raise ValueError("manifest.json was changed")
    for name, size in manifest["bytes"].items():
        if (path / name).stat().st_size != size:
            raise ValueError(f"{name} is not of {size:,} bytes")
    return manifest


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock file: one process at a time. The lock dies with its process; the empty file stays."""
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("another process is making the cache %s; waiting for it", path.with_suffix(""))
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # also for copies that a fork took with it
