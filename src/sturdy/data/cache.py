"""Decoded images in one memory-mapped file, made once from a source and then only read.

    cache[source.key] = [decode(0), decode(1), ...] without the broken ones

It is written aside and renamed when whole: a kill at any instant leaves either a whole cache or
    none. Its
``digest`` hashes the content alone, so that equal images have equal digests wherever they lie; a
run keeps it, and finds the images it began with again by it, whatever became of the source.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from exact_resume.files import LockUnsupportedError, fsync_directory, lock_file
from sturdy.data.build import build, seal
from sturdy.data.source import Source

LAYOUT = 3  # of the files that ``build`` writes; raise it whenever they change

log = logging.getLogger(__name__)


class TooManyBroken(ValueError):
    """More of the images are broken than the run accepts to do without."""


class Damaged(Exception):
    """What is on the disk is not a whole cache."""


class Cache:
    """The decoded images of a source. It pickles as its path, and every process maps the same
    memory.

    Attributes:
        digest: of images, labels and classes.
        contents, digest_with_contents: a hash of each image's content, ``(n,)``, and the digest of
            these too; ``None`` in a cache that an older version made.

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
            self.digest_with_contents: str | None = manifest.get("digest_with_contents")
            self.quarantine: list[tuple[str, str]] = [
                (name, why) for name, why in manifest["quarantine"]
            ]
            self.small: list[str] = manifest.get(
                "small", []
            )  # names of images left out because of their size
            self.remarks: list[str] = manifest.get(
                "remarks", []
            )  # what is odd about the images, a line each
            self.labels: np.ndarray = np.load(self.path / "labels.npy")  # (n,) int64
            self.shapes: np.ndarray = np.load(
                self.path / "shapes.npy"
            )  # (n, 2) int64, heights and widths
            self.contents: np.ndarray | None = None  # (n,) uint64
            if self.digest_with_contents:
                self.contents = np.load(self.path / "contents.npy")
            pixels = np.memmap(self.path / "images.bin", dtype=np.uint8, mode="r").view(np.ndarray)
        except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError) as error:
            raise Damaged(f"{self.path}: {error}") from error
        self.labels.flags.writeable = self.shapes.flags.writeable = False
        self.uniform = bool((self.shapes == self.shapes[0]).all())
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
        return self.names[index]

    @cached_property
    def names(self) -> list[str]:
        """What to call each image."""
        names: list[str] = json.loads((self.path / "names.json").read_bytes())
        return names

    def image(self, index: int) -> np.ndarray:
        """One image, uint8 ``(3, h, w)``, a read-only view of the memory map."""
        if self.uniform:
            return self._images[index]
        index = range(len(self))[index]
        return self._pixels[self._ends[index] : self._ends[index + 1]].reshape(
            3, *self.shapes[index]
        )

    def gather(self, indices: np.ndarray) -> np.ndarray:
        """A batch, uint8 ``(b, 3, h, w)``, copied; only where all images have one shape (see
        ``uniform``).
        """
        if not self.uniform:
            raise ValueError(
                "images of different shapes make no batch: crop each `image(index)` first"
            )
        return self._images[indices]

    def report(self, most: int = 10) -> str:
        """Which images were left out and why, in plain text: the first ``most``, and where all are
        listed.
        """
        broken = self.quarantine
        if not broken:
            return ""
        heading = f"{len(broken):,} of {len(self) + len(broken):,} images are left out"
        where = (
            f"; the first {most} are below, all in {self.path / 'quarantine.txt'}"
            if len(broken) > most
            else ""
        )
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
        max_broken: most broken images to do without: a share from 0 to 1, or their number, an
            ``int`` from 1 on.
        workers: threads that decode, 0 for none but the caller's, ``None`` for one a CPU. Decoders
            let go of Python's lock, and threads cannot outlive the process. The bytes are the same
            at any number.
        progress: told ``(done, total)`` now and then.

    Raises:
        TooManyBroken: the share is larger, or no image is left.
        ValueError: the source has no images, or the disk not enough room.
        OSError: the disk is full (nothing is left behind), or ``root`` cannot be written or locked.
    """
    total = len(source)
    if total == 0:
        raise ValueError("the source has no images")
    root = Path(root).expanduser().absolute()
    stem = hashlib.sha256(f"{LAYOUT} {source.key}".encode()).hexdigest()[:32]
    path, aside = root / stem, root / f"{stem}.building"
    cache = _existing(path, source.key)
    if cache is None:
        with _locked(root / f"{stem}.lock"):
            cache = _existing(
                path, source.key
            )  # another process may have made it while this one waited
            if cache is None:
                for remains in (aside, path):  # of a build that was killed; of a damaged cache
                    if remains.exists():
                        shutil.rmtree(remains)
                try:
                    broken = build(source, aside, workers=workers, progress=progress)
                    if len(broken) == total:
                        raise TooManyBroken(f"all {total:,} images are broken:\n{_table(broken)}")
                    os.rename(aside, path)
                    fsync_directory(root)
                finally:
                    shutil.rmtree(aside, ignore_errors=True)
                cache = Cache(path)
    most = max_broken if isinstance(max_broken, int) else max_broken * total
    if len(cache.quarantine) > most:  # it stays, for a run that accepts more
        share = len(cache.quarantine) / total
        raise TooManyBroken(
            f"{share:.2%} of the images are broken, more than data.max_broken={max_broken} "
            f"accepts: {cache.report()}\n"
            f"Repair or remove them, or accept so many with "
            f"data.max_broken={len(cache.quarantine)}."
        )
    return cache


def find_cache(
    root: str | os.PathLike[str], digest: str, *, prefer: str | None = None
) -> Cache | None:
    """The cache under ``root`` that holds the images of ``digest``, whatever source they came from.

    Only manifests are read, and that all files are as long as these say.

    Args:
        root: the folder of all caches.
        digest: with or without contents.
        prefer: the key of the source to take it from, where several have the same images.
    """
    found = None
    for path in sorted(Path(root).expanduser().absolute().glob("*/manifest.json")):
        if path.parent.suffix:  # one that is being built
            continue
        try:
            manifest = _read_manifest(path.parent)
            if digest not in (manifest["digest"], manifest.get("digest_with_contents")):
                continue
            cache = Cache(path.parent)
        except (OSError, ValueError, KeyError, TypeError, Damaged):
            continue
        if cache.key == prefer:
            return cache
        found = found or cache
    return found


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
    """Hold the lock file: one process at a time. The lock dies with its process; the empty file
    stays.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "ab")  # noqa: SIM115
    except OSError as error:
        what = f"paths.cache cannot be written ({error.strerror}): choose another folder with paths.cache=..."
        raise OSError(
            error.errno, what, str(path.parent)
        ) from None  # a cause would be told instead
    with file:
        try:
            if not lock_file(file):
                log.warning(
                    "another process is making the cache %s; waiting for it", path.with_suffix("")
                )
                lock_file(file, wait=True)
        except LockUnsupportedError as error:
            raise LockUnsupportedError(f"paths.cache: {error}") from None
        yield
