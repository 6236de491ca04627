"""Decoded images in one memory-mapped file, made once from a source and then only read.

    cache[source.key] = [decode(0), decode(1), ...] without the broken ones

It is written into another folder, which is renamed when it is complete: a kill at any instant
leaves a complete cache or none. Its ``digest`` hashes the content alone, so that equal images have
equal digests wherever they lie. A run keeps the digest, and finds its images by it, whatever became
of the source.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exact_resume.files import LockUnsupportedError, fsync_directory, lock_file
from sturdy.data.cache_writer import Quarantine, seal, write_cache
from sturdy.data.source import PixelFormat, Source
from sturdy.data.streamed_images import StreamedImages, stream_names

LAYOUT = 3  # of the files that ``write_cache`` writes; raise it whenever they change
MAX_LISTED = 10  # most broken images that a report lists

log = logging.getLogger(__name__)


class TooManyBrokenError(ValueError):
    """More images are broken than the run accepts."""


class CorruptCacheError(Exception):
    """A file of the cache is missing, cut short, or not as the manifest says."""


class Cache:
    """The decoded images of a source. It pickles as its path; all processes map the same memory.

    Args:
        path: a folder made by ``open_cache``.

    Attributes:
        key: of the source.
        classes: of the source.
        channels: number of channels of each image.
        dtype: NumPy type of the images.
        labels: ``(n,)``, int64.
        shapes: height and width of each image, ``(n, 2)``, int64.
        caption_rows: the row in ``captions`` of the caption of each image, ``(n,)``, int64, and
            ``len(captions)`` where it is empty; ``None`` if the source had no captions.
        digest: of images, labels and classes, and of captions, if there are any.
        digest_of_images: of the images alone.
        digest_with_contents: of these and ``contents``; ``None`` in a cache of an older version.
        contents: a hash of the content of each image, ``(n,)``, uint64; ``None`` in a cache of an
            older version.
        quarantine: names of the broken images, with the reasons.
        small: names of the images that were left out because of their size.
        unusual: lines about unusual images; see ``cache_writer.describe_unusual``.
        stream: where the images are, if they are read from shards at every use; else ``None``.

    Raises:
        CorruptCacheError: this is not a complete cache.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            manifest = _read_manifest(self.path)
            self.key: str = manifest["key"]
            self.classes: tuple[str, ...] = tuple(manifest["classes"])
            self.channels: int = manifest.get("channels", PixelFormat().channels)
            self.dtype = np.dtype(manifest.get("dtype", PixelFormat().dtype))
            self.digest: str = manifest["digest"]
            # Caches of older versions have no hash without the labels.
            self.digest_of_images: str = manifest.get("digest_of_images", self.digest)
            self.digest_with_contents: str | None = manifest.get("digest_with_contents")
            self.quarantine: Quarantine = [(name, why) for name, why in manifest["quarantine"]]
            self.small: list[str] = manifest.get("small", [])
            self.unusual: list[str] = manifest.get("remarks", [])
            self.labels: np.ndarray = np.load(self.path / "labels.npy")
            self.shapes: np.ndarray = np.load(self.path / "shapes.npy")
            self.contents: np.ndarray | None = None
            if self.digest_with_contents:
                self.contents = np.load(self.path / "contents.npy")
            self.caption_rows: np.ndarray | None = None
            if "captions.npy" in manifest["bytes"]:
                self.caption_rows = np.load(self.path / "captions.npy")
            self.stream: StreamedImages | None = None
            if "stream" in manifest:
                self.stream = StreamedImages(
                    self.path, manifest["stream"], self.shapes, self.contents
                )
            else:
                memory = np.memmap(self.path / "images.bin", dtype=self.dtype, mode="r")
                self._pixels = memory.view(np.ndarray)
                sizes = self.channels * self.shapes.prod(axis=1)
                self._ends = np.concatenate([[0], np.cumsum(sizes)])
        except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError) as error:
            raise CorruptCacheError(f"{self.path}: {error}") from error
        self.labels.flags.writeable = False
        self.shapes.flags.writeable = False

    def __len__(self) -> int:
        return len(self.labels)

    def __reduce__(self) -> tuple[type["Cache"], tuple[Path]]:
        return Cache, (self.path,)

    @cached_property
    def names(self) -> Sequence[str]:
        """The name of each image in messages and tables."""
        if self.stream:
            return stream_names(self.path)
        names: list[str] = json.loads((self.path / "names.json").read_bytes())
        return names

    @cached_property
    def captions(self) -> list[str]:
        """The distinct captions; empty if the source had none."""
        if self.caption_rows is None:
            return []
        captions: list[str] = json.loads((self.path / "captions.json").read_bytes())
        return captions

    def caption(self, index: int) -> str:
        """Return the text of an image's caption; empty without captions."""
        row = 0 if self.caption_rows is None else int(self.caption_rows[index])
        return self.captions[row] if row < len(self.captions) else ""

    def image(self, index: int) -> np.ndarray:
        """Return one image, ``(c, h, w)``, a read-only view of the memory map."""
        index = range(len(self))[index]
        if self.stream:
            return self.stream.image(index)
        pixels = self._pixels[self._ends[index] : self._ends[index + 1]]
        return pixels.reshape(self.channels, *self.shapes[index])

    def images(self, indices: Sequence[int] | NDArray[np.int64]) -> Iterator[np.ndarray]:
        """Yield the image at each index; those of a stream are read several at once."""
        return self.stream.images(indices) if self.stream else map(self.image, indices)

    def report(self, most: int = MAX_LISTED) -> str:
        """Describe the first ``most`` of the broken images, and where all are listed."""
        broken = self.quarantine
        if not broken:
            return ""
        heading = f"{len(broken):,} of {len(self) + len(broken):,} images are left out"
        if len(broken) > most:
            heading += f"; the first {most} are below, all in {self.path / 'quarantine.txt'}"
        return f"{heading}:\n{_as_table(broken[:most])}"


def open_cache(
    source: Source,
    *,
    root: str | os.PathLike[str],
    max_broken: float = 0.01,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Cache:
    """Open the cache of ``source`` under ``root``; make it if it is missing or corrupt.

    Args:
        source: its images are decoded in its order.
        root: the folder of all caches.
        max_broken: most broken images to accept: a fraction, ``float``, or a number, ``int``.
        workers: threads that decode; 0 for the caller's alone, ``None`` for one per CPU. Decoders
            release Python's lock, and threads cannot outlive the process. The number changes no
            byte.
        progress: called with ``(done, total)`` now and then.

    Raises:
        TooManyBrokenError: more images are broken, or all are.
        ValueError: the source has no images, or the disk has not enough room.
        OSError: the disk is full (no file is left behind), or ``root`` cannot be written or locked.
    """
    if len(source) == 0:
        raise ValueError("the source has no images")
    root = Path(root).expanduser().absolute()
    path = root / hashlib.sha256(f"{LAYOUT} {source.key}".encode()).hexdigest()[:32]
    cache = _open_if_intact(path, source.key)
    if cache is None:
        with lock_folder(path.with_suffix(".lock")):
            # Another process may have made it while this one waited.
            cache = _open_if_intact(path, source.key)
            if cache is None:
                cache = _make(source, path, workers, progress)
    total = len(source)
    broken = len(cache.quarantine)
    # A cache with too many broken images stays, for a run that accepts more.
    if broken > (max_broken if isinstance(max_broken, int) else max_broken * total):
        raise TooManyBrokenError(
            f"{broken / total:.2%} of the images are broken, more than max_broken={max_broken} "
            f"accepts: {cache.report()}\n"
            f"Repair or remove them, or accept so many with max_broken={broken}."
        )
    return cache


def _make(
    source: Source,
    path: Path,
    workers: int | None,
    progress: Callable[[int, int], None] | None,
) -> Cache:
    unfinished = path.with_suffix(".building")
    for leftover in (unfinished, path):  # of a killed process; a corrupt cache
        if leftover.exists():
            shutil.rmtree(leftover)
    try:
        if hasattr(source, "write_tables"):  # its images stay where they are
            broken = source.write_tables(unfinished)
        else:
            broken = write_cache(source, unfinished, workers=workers, progress=progress)
        if len(broken) == len(source):
            listed = _as_table(broken[:MAX_LISTED])
            raise TooManyBrokenError(f"all {len(broken):,} images are broken:\n{listed}")
        os.rename(unfinished, path)
        fsync_directory(path.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return Cache(path)


def find_cache(
    root: str | os.PathLike[str], digest: str, *, prefer: str | None = None
) -> Cache | None:
    """Find the cache under ``root`` with the images of ``digest``, whatever their source.

    Only manifests and the lengths of files are read.

    Args:
        root: the folder of all caches.
        digest: with contents or without.
        prefer: the key of the source to prefer, where several caches have the same images.
    """
    found = None
    for path in sorted(Path(root).expanduser().absolute().glob("*/manifest.json")):
        if path.parent.suffix:  # unfinished
            continue
        try:
            manifest = _read_manifest(path.parent)
            if digest not in (manifest["digest"], manifest.get("digest_with_contents")):
                continue
            cache = Cache(path.parent)
        except (OSError, ValueError, KeyError, TypeError, CorruptCacheError):
            continue
        if cache.key == prefer:
            return cache
        found = found or cache
    return found


def _as_table(broken: Quarantine) -> str:
    width = max(len(name) for name, _ in broken)
    return "\n".join(f"  {name:<{width}}  {reason}" for name, reason in broken)


def _open_if_intact(path: Path, key: str) -> Cache | None:
    if not path.exists():
        return None
    try:
        cache = Cache(path)
    except CorruptCacheError as error:
        log.warning("the cache is damaged and is made again: %s", error)
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
def lock_folder(path: Path) -> Iterator[None]:
    """Hold the lock file ``path``, which one process can.

    The lock ends with its process; the empty file stays.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "ab")  # noqa: SIM115
    except OSError as error:
        message = f"cannot be written ({error.strerror}): choose another folder"
        # Without a cause, which would be shown instead.
        raise OSError(error.errno, f"cache={path.parent} {message}") from None
    with file:
        try:
            if not lock_file(file):
                log.warning(
                    "another process is making the cache %s; waiting for it", path.with_suffix("")
                )
                lock_file(file, wait=True)
        except LockUnsupportedError as error:
            raise LockUnsupportedError(f"cache={error}") from None
        yield
