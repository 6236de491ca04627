"""Writing a cache: everything a source decodes, durably, into a new folder.

images.bin   the pixels of image after image        labels.npy, shapes.npy, names.json   one entry
an image
contents.npy   a hash of each image's content       quarantine.txt   what was left out and why
manifest.json   what the files must be, sealed by a hash
"""

import errno
import hashlib
import json
import logging
import shutil
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from exact_resume.files import fsync_directory, open_durable
from exact_resume.system import available_cpus
from sturdy.data.remarks import Look, hashed, look_at, remarks
from sturdy.data.source import BadImageError, ImageTooSmallError, Source

CHUNK = 16  # images a worker decodes at a time
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LARGE = 10**9  # bytes; a cache of more is announced

log = logging.getLogger(__name__)


class Seen(NamedTuple):
    """A decoded image, and what is remembered of it."""

    image: np.ndarray
    look: Look
    content: int  # a hash of what tells it from all others


def build(
    source: Source,
    path: Path,
    *,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[tuple[str, str]]:
    """Write everything into the new folder ``path``, durably; see ``open_cache``.

    Returns:
        The quarantine: names and reasons of the broken images.

    Raises:
        ValueError: if the disk has not enough room, told after the first image; or no image is
            left, though some are whole.
        OSError: if it cannot be written.
    """
    total, done = len(source), 0
    kept: list[int] = []
    looks: list[Look] = []
    small: list[int] = []
    names: list[str] = []
    labels: list[int] = []
    shapes: list[tuple[int, int]] = []
    contents: list[int] = []
    quarantine: list[tuple[str, str]] = []
    digest = hashlib.sha256()
    tell = progress or (lambda done, total: None)
    path.mkdir()
    try:
        tell(0, total)
        with (
            open_durable(path / "images.bin") as file,
            closing(_decoded(source, workers)) as images,
        ):
            for done, seen in enumerate(images, start=1):
                if isinstance(seen, ImageTooSmallError):
                    small.append(done - 1)
                elif isinstance(seen, BadImageError):
                    quarantine.append((source.name(done - 1), str(seen)))
                else:
                    image = seen.image
                    if not names:
                        need_room(path.parent, total * image.nbytes)
                    kept.append(done - 1)
                    looks.append(seen.look)
                    contents.append(seen.content)
                    names.append(source.name(done - 1))
                    labels.append(source.label(done - 1))
                    shapes.append(image.shape[1:])
                    digest.update(np.array(image.shape[1:], dtype="<i8").tobytes())
                    digest.update(image.data)
                    file.write(image.data)
                if done % CHUNK == 0 or done == total:
                    tell(done, total)
        if small and not kept:
            raise ValueError(
                f"no image is left: {len(small):,} of {total:,} are smaller than data.min_side"
            )
        digest.update(np.array(labels, dtype="<i8").tobytes())
        digest.update(json.dumps(source.classes).encode())
        with_contents = digest.copy()
        with_contents.update(np.array(contents, dtype="<u8").tobytes())
        for name, array, dtype in (
            ("labels", labels, "i8"),
            ("shapes", shapes, "i8"),
            ("contents", contents, "u8"),
        ):
            with open_durable(path / f"{name}.npy") as file:
                np.save(file, np.array(array, dtype=dtype))
        with open_durable(path / "names.json") as file:
            file.write(json.dumps(names).encode())
        with open_durable(path / "quarantine.txt") as file:
            file.writelines(f"{name}\t{reason}\n".encode() for name, reason in quarantine)
            file.writelines(
                f"{source.name(index)}\tsmaller than data.min_side\n".encode() for index in small
            )
        manifest: dict[str, Any] = {
            "key": source.key,
            "classes": source.classes,
            "n": len(names),
            "shape": [3, *shapes[0]] if len(set(shapes)) == 1 else None,  # None: see shapes.npy
            "quarantine": quarantine,
            "small": [source.name(index) for index in small],
            "remarks": remarks(source, kept, looks, small),
            "digest": digest.hexdigest(),
            "digest_with_contents": with_contents.hexdigest(),
            "bytes": {file.name: file.stat().st_size for file in sorted(path.iterdir())},
        }
        with open_durable(path / "manifest.json") as file:
            file.write(json.dumps({**manifest, "seal": seal(manifest)}, indent=1).encode())
        fsync_directory(path)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise OSError(
            error.errno,
            f"the disk is full after {done:,} of {total:,} images: make room, or move paths.cache",
            str(path.parent),
        ) from None  # a cause would be told instead
    return quarantine


def need_room(root: Path, size: int) -> None:
    """Tell of a cache of ``size`` bytes in ``root`` if that is much.

    Raises:
        ValueError: if the disk has less room.
    """
    if (free := shutil.disk_usage(root).free) < size:
        raise ValueError(
            f"paths.cache={root} has room for {free / 1e9:,.1f} GB, and the decoded images take "
            f"{size / 1e9:,.1f} GB: "
            f"make room, move paths.cache to a larger disk, or lower data.image_size"
        )
    if size > LARGE:
        log.warning("the decoded images take %s GB in %s", f"{size / 1e9:,.1f}", root)


def seal(manifest: dict[str, Any]) -> str:
    """The hash that tells whether a manifest is as it was written."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _decoded(source: Source, workers: int | None) -> Generator[Seen | BadImageError, None, None]:
    """Every image of the source, or why not, in its order."""

    def chunk(start: int) -> list[Seen | BadImageError]:
        return [_attempt(source, index) for index in range(start, min(start + CHUNK, len(source)))]

    starts = range(0, len(source), CHUNK)
    if workers is None:
        workers = available_cpus()
    if workers == 0:
        for start in starts:
            yield from chunk(start)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    try:
        waiting: deque[Future[list[Seen | BadImageError]]] = deque()
        for start in starts:
            waiting.append(pool.submit(chunk, start))
            if len(waiting) > 2 * workers:  # bounds the memory
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _attempt(source: Source, index: int) -> Seen | BadImageError:
    try:
        image = source.decode(index)
        content = source.content(index) if hasattr(source, "content") else None
    except BadImageError as broken:
        return broken
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise TypeError(
            f"{source.name(index)}: decode gave {image.dtype} {image.shape}, not uint8 (3, h, w)"
        )
    image = np.ascontiguousarray(image)
    look = look_at(image)
    return Seen(image, look, look.hash if content is None else hashed(content))
