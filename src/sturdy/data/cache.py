"""Decoded images in one memory-mapped file, made once from a source and then only read.

    cache[source.key] = [decode(0), decode(1), ...] without the broken ones

It is written aside and renamed when whole: a kill at any instant leaves either a whole cache or none. Its
``digest`` hashes the content alone, so that equal images have equal digests wherever they lie.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sturdy.data.decode import Broken

LAYOUT = 1  # of the files below; raise it whenever they change
CHUNK = 16  # images a worker decodes at a time
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

log = logging.getLogger(__name__)


class Source(Protocol):
    """A finite collection of images that can be decoded one by one, from several threads at once."""

    classes: tuple[str, ...]
    """Label ``k`` is ``classes[k]``; empty when unlabelled."""
    key: str
    """Changes whenever ``decode`` or ``label`` of any index could give something else."""

    def __len__(self) -> int: ...

    def label(self, index: int) -> int:
        """The number of the class, 0 when unlabelled."""

    def name(self, index: int) -> str:
        """What to call the image in messages and tables."""

    def decode(self, index: int) -> np.ndarray:
        """The image, uint8 ``(3, h, w)``; raises ``Broken`` with the reason."""


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
            self.labels: np.ndarray = np.load(self.path / "labels.npy")  # (n,) int64
            self._shapes = np.load(self.path / "shapes.npy")  # (n, 2) int64
            pixels = np.memmap(self.path / "images.bin", dtype=np.uint8, mode="r").view(np.ndarray)
        except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError) as error:
            raise Damaged(f"{self.path}: {error}") from error
        self.labels.flags.writeable = False
        self.uniform = bool((self._shapes == self._shapes[0]).all())
        self._names: list[str] | None = None
        if self.uniform:
            self._images = pixels.reshape(-1, 3, *self._shapes[0])
        else:
            self._pixels = pixels
            self._ends = np.concatenate([[0], np.cumsum(3 * self._shapes.prod(axis=1))])

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
        return self._pixels[self._ends[index] : self._ends[index + 1]].reshape(3, *self._shapes[index])

    def gather(self, indices: np.ndarray) -> np.ndarray:
        """A batch, uint8 ``(b, 3, h, w)``, copied; only where all images have one shape (see ``uniform``)."""
        if not self.uniform:
            raise ValueError("images of different shapes make no batch: crop each `image(index)` first")
        return self._images[indices]


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
        max_broken: largest share of broken images to do without, from 0 to 1.
        workers: threads that decode, 0 for none but the caller's, ``None`` for one a CPU. Decoders let go of
            Python's lock, and threads cannot outlive the process. The bytes are the same at any number.
        progress: told ``(done, total)`` now and then.

    Raises:
        TooManyBroken: the share is larger, or no image is left.
        OSError: the disk is full (nothing is left behind), or cannot be locked.
    """
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
                    quarantine = _build(source, aside, workers, progress)
                    _judge(quarantine, len(source), max_broken)
                    os.rename(aside, path)
                    _sync(root)
                finally:
                    shutil.rmtree(aside, ignore_errors=True)
                cache = Cache(path)
    _judge(cache.quarantine, len(source), max_broken)
    return cache


def quarantine_table(cache: Cache, most: int = 10) -> str:
    """The images that were left out and why, as plain text of at most ``most`` rows; empty if none."""
    broken = cache.quarantine
    if not broken:
        return ""
    return f"{len(broken):,} of {len(cache) + len(broken):,} images are left out:\n{_table(broken, most)}"


def _table(broken: list[tuple[str, str]], most: int = 10) -> str:
    width = max(len(name) for name, _ in broken[:most])
    rows = [f"  {name:<{width}}  {reason}" for name, reason in broken[:most]]
    return "\n".join(rows + [f"  ... and {len(broken) - most:,} more"] * (len(broken) > most))


def _judge(broken: list[tuple[str, str]], total: int, max_broken: float) -> None:
    if total == 0:
        raise ValueError("the source has no images")
    if len(broken) == total:
        raise TooManyBroken(f"all {total:,} images are broken:\n{_table(broken)}")
    if len(broken) > max_broken * total:
        raise TooManyBroken(
            f"{len(broken):,} of {total:,} images ({len(broken) / total:.2%}) are broken, more than "
            f"data.max_broken={max_broken} accepts:\n{_table(broken)}\n"
            "Repair or remove them, or raise data.max_broken."
        )


def _existing(path: Path, key: str) -> Cache | None:
    if not path.exists():
        return None
    try:
        cache = Cache(path)
    except Damaged as damage:
        log.warning("the cache is damaged and is made again: %s", damage)
        return None
    return cache if cache.key == key else None


def _build(
    source: Source, path: Path, workers: int | None, progress: Callable[[int, int], None] | None
) -> list[tuple[str, str]]:
    """Write everything into the new folder ``path``, durably; return the quarantine."""
    total, done = len(source), 0
    names: list[str] = []
    labels: list[int] = []
    shapes: list[tuple[int, int]] = []
    quarantine: list[tuple[str, str]] = []
    digest = hashlib.sha256()
    path.mkdir()
    try:
        with open(path / "images.bin", "wb") as file, closing(_decoded(source, workers)) as images:
            for done, image in enumerate(images, start=1):
                if isinstance(image, Broken):
                    quarantine.append((source.name(done - 1), str(image)))
                else:
                    names.append(source.name(done - 1))
                    labels.append(source.label(done - 1))
                    shapes.append(image.shape[1:])
                    digest.update(np.array(image.shape[1:], dtype="<i8").tobytes())
                    digest.update(image.data)
                    file.write(image.data)
                if progress is not None and (done % CHUNK == 0 or done == total):
                    progress(done, total)
            _flush(file)
        digest.update(np.array(labels, dtype="<i8").tobytes())
        digest.update(json.dumps(source.classes).encode())
        for name, array in (("labels", labels), ("shapes", shapes)):
            with open(path / f"{name}.npy", "wb") as file:
                np.save(file, np.array(array, dtype=np.int64))
                _flush(file)
        with open(path / "names.json", "wb") as file:
            file.write(json.dumps(names).encode())
            _flush(file)
        manifest: dict[str, Any] = {
            "key": source.key,
            "classes": source.classes,
            "n": len(names),
            "shape": [3, *shapes[0]] if len(set(shapes)) == 1 else None,  # None: see shapes.npy
            "quarantine": quarantine,
            "digest": digest.hexdigest(),
            "bytes": {file.name: file.stat().st_size for file in sorted(path.iterdir())},
        }
        with open(path / "manifest.json", "wb") as file:
            file.write(json.dumps({**manifest, "seal": _seal(manifest)}, indent=1).encode())
            _flush(file)
        _sync(path)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise OSError(
            error.errno,
            f"the disk is full after {done:,} of {total:,} images: make room, or move paths.cache",
            str(path.parent),
        ) from error
    return quarantine


def _decoded(source: Source, workers: int | None) -> Generator[np.ndarray | Broken]:
    """Every image of the source, or why not, in its order."""

    def chunk(start: int) -> list[np.ndarray | Broken]:
        return [_attempt(source, index) for index in range(start, min(start + CHUNK, len(source)))]

    starts = range(0, len(source), CHUNK)
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers == 0:
        for start in starts:
            yield from chunk(start)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    try:
        waiting: deque[Future[list[np.ndarray | Broken]]] = deque()
        for start in starts:
            waiting.append(pool.submit(chunk, start))
            if len(waiting) > 2 * workers:  # bounds the memory
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _attempt(source: Source, index: int) -> np.ndarray | Broken:
    try:
        image = source.decode(index)
    except Broken as broken:
        return broken
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise TypeError(f"{source.name(index)}: decode gave {image.dtype} {image.shape}, not uint8 (3, h, w)")
    return np.ascontiguousarray(image)


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest = json.loads((path / "manifest.json").read_bytes())
    if manifest.pop("seal") != _seal(manifest):
        raise ValueError("manifest.json was changed")
    for name, size in manifest["bytes"].items():
        if (path / name).stat().st_size != size:
            raise ValueError(f"{name} is not of {size:,} bytes")
    return manifest


def _seal(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock file: one process at a time. The lock dies with its process; the empty file stays."""
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another process is making the cache %s; waiting for it", path.with_suffix(""))
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # also for copies that a fork took with it


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Make the names in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
