"""Writes a cache: decodes every image of a source, durably, into a new folder.

images.bin     the pixels of image after image
labels.npy     labels, ``(n,)``
shapes.npy     heights and widths, ``(n, 2)``
contents.npy   a hash of the content of each image, ``(n,)``
captions.json  the distinct captions, if the source has captions
captions.npy   the row in them of the caption of each image, ``(n,)``
names.json     the name of each image
quarantine.txt the images that were left out, and why
manifest.json  a description of these files, sealed by a hash
"""

import errno
import hashlib
import json
import logging
import shutil
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from exact_resume.files import fsync_directory, open_durable
from exact_resume.system import available_cpus
from sturdy.data.buckets import describe_cut
from sturdy.data.source import (
    BadImageError,
    ImageTooSmallError,
    PixelFormat,
    Source,
    pixel_format,
)

CHUNK = 16  # images that a worker decodes at a time
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LARGE = 10**9  # bytes; a larger cache is announced
# Images with a smaller range of their 256 values count as of one colour. 12 bits stored in 16 have
# 16 values, and a resize goes a little beyond them.
NARROW_RANGE = 24

Quarantine = list[tuple[str, str]]
"""Names of the broken images, with the reasons."""

log = logging.getLogger(__name__)


class Entry(NamedTuple):
    """What is kept in memory of an image in the cache."""

    source_index: int
    shape: tuple[int, ...]  # height and width
    pixel_hash: int
    content_hash: int
    is_one_colour: bool  # or nearly


def write_cache(
    source: Source,
    path: Path,
    *,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Quarantine:
    """Write the new folder ``path``, durably; arguments as of ``open_cache``.

    Raises:
        ValueError: the disk has not enough room (raised after the first image), or all images are
            too small.
        OSError: the folder cannot be written.
    """
    total = len(source)
    done = 0
    entries: list[Entry] = []
    too_small: list[int] = []
    quarantine: Quarantine = []
    pixels = pixel_format(source)
    digest = hashlib.sha256()
    if pixels != PixelFormat():  # older digests are of this format, which they do not contain
        digest.update(json.dumps(pixels).encode())
    report = progress or (lambda done, total: None)
    path.mkdir()
    try:
        report(0, total)
        with (
            open_durable(path / "images.bin") as file,
            closing(_decode_all(source, workers)) as results,
        ):
            for index, result in enumerate(results):
                if isinstance(result, ImageTooSmallError):
                    too_small.append(index)
                elif isinstance(result, BadImageError):
                    quarantine.append((source.name(index), str(result)))
                else:
                    image, entry = result
                    if not entries:
                        check_disk_space(path.parent, total * image.nbytes)
                    entries.append(entry)
                    digest.update(np.array(entry.shape, dtype="<i8").tobytes())
                    digest.update(image.data)
                    file.write(image.data)
                done = index + 1
                if done % CHUNK == 0 or done == total:
                    report(done, total)
        if too_small and not entries:
            raise ValueError(
                f"no image is left: {len(too_small):,} of {total:,} are smaller than min_side"
            )
        _write_tables(source, path, entries, too_small, quarantine, pixels, digest)
        fsync_directory(path)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        message = f"the disk is full after {done:,} of {total:,} images: make room, or move cache="
        # Without a cause, which would be shown instead.
        raise OSError(error.errno, f"{message}{path.parent}") from None
    return quarantine


def _write_tables(
    source: Source,
    path: Path,
    entries: Sequence[Entry],
    too_small: Sequence[int],
    quarantine: Quarantine,
    pixels: PixelFormat,
    digest: Any,
) -> None:
    """Write all files but the pixels, of which ``digest`` is."""
    captions = list(getattr(source, "captions", ()))
    kept = [entry.source_index for entry in entries]
    with open_durable(path / "names.json") as file:
        file.write(json.dumps([source.name(index) for index in kept]).encode())
    save_tables(
        path,
        key=source.key,
        classes=source.classes,
        labels=np.array([source.label(index) for index in kept], dtype="i8"),
        shapes=np.array([entry.shape for entry in entries], dtype="i8"),
        contents=np.array([entry.content_hash for entry in entries], dtype="<u8"),
        captions=captions,
        rows=caption_rows(source, kept, len(captions)) if captions else None,
        quarantine=quarantine,
        small=[source.name(index) for index in too_small],
        remarks=describe_unusual(source, entries, too_small),
        pixels=pixels,
        digest=digest,
    )


def save_tables(
    path: Path,
    *,
    key: str,
    classes: Sequence[str],
    labels: np.ndarray,
    shapes: np.ndarray,
    contents: np.ndarray,
    captions: Sequence[str],
    rows: np.ndarray | None,
    quarantine: Quarantine,
    small: Sequence[str],
    remarks: Sequence[str],
    pixels: PixelFormat,
    digest: Any,
    **others: Any,
) -> None:
    """Write the files that have a row for each image, and the manifest, which comes last.

    Args:
        path: the folder, with all other files in it.
        key: of the source, as ``classes`` and ``captions``.
        classes: the name of each class.
        labels: ``(n,)``.
        shapes: ``(n, 2)``.
        contents: ``(n,)``.
        captions: the distinct captions.
        rows: of the captions, ``(n,)``; ``None`` without captions.
        quarantine: the broken images.
        small: names of the images that were left out because of their size.
        remarks: about unusual images.
        pixels: the format of the images.
        digest: a hash object that has hashed the images.
        **others: more entries of the manifest.
    """
    digest_of_images = digest.hexdigest()
    digest.update(labels.astype("<i8").tobytes())
    digest.update(json.dumps(classes).encode())
    if rows is not None:
        digest.update(b"captions" + json.dumps(captions).encode() + rows.tobytes())
        _save(path / "captions.npy", rows)
        with open_durable(path / "captions.json") as file:
            file.write(json.dumps(captions).encode())
    with_contents = digest.copy()
    with_contents.update(contents.tobytes())

    _save(path / "labels.npy", labels)
    _save(path / "shapes.npy", shapes)
    _save(path / "contents.npy", contents)
    left_out = [*quarantine, *((name, "smaller than min_side") for name in small)]
    with open_durable(path / "quarantine.txt") as file:
        file.writelines(f"{name}\t{reason}\n".encode() for name, reason in left_out)
    manifest: dict[str, Any] = {
        "key": key,
        "classes": classes,
        "n": len(labels),
        "channels": pixels.channels,
        "dtype": pixels.dtype,
        "quarantine": quarantine,
        "small": small,
        "remarks": remarks,
        "digest": digest.hexdigest(),
        "digest_of_images": digest_of_images,
        "digest_with_contents": with_contents.hexdigest(),
        **others,
        "bytes": {file.name: file.stat().st_size for file in sorted(path.iterdir())},
    }
    with open_durable(path / "manifest.json") as file:
        file.write(json.dumps({**manifest, "seal": seal(manifest)}, indent=1).encode())


def caption_rows(source: Any, indices: Sequence[int], captions: int) -> np.ndarray:
    """Return the rows of the captions of the images at ``indices``, int64 ``(n,)``.

    Raises:
        ValueError: a row is not in [0, captions].
    """
    rows = np.array([source.caption(index) for index in indices], dtype="<i8")
    if rows.size and (rows.min() < 0 or rows.max() > captions):
        raise ValueError(
            f"the source has {captions:,} captions, and caption() of an image gives a row out of "
            f"[0, {captions:,}]"
        )
    return rows


def _save(path: Path, array: np.ndarray) -> None:
    with open_durable(path) as file:
        np.save(file, array)


def seal(manifest: dict[str, Any]) -> str:
    """Return the hash that shows whether a manifest is unchanged."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def check_disk_space(folder: Path, size: int) -> None:
    """Announce a large cache of ``size`` bytes in ``folder``.

    Raises:
        ValueError: the disk has less room.
    """
    free = shutil.disk_usage(folder).free
    if free < size:
        raise ValueError(
            f"cache={folder} has room for {free / 1e9:,.1f} GB, and the decoded images take "
            f"{size / 1e9:,.1f} GB: make room, choose a larger disk, or lower image_size=..."
        )
    if size > LARGE:
        log.warning("the decoded images take %s GB in %s", f"{size / 1e9:,.1f}", folder)


# --- Decoding

Result = tuple[np.ndarray, Entry] | BadImageError


def _decode_all(source: Source, workers: int | None) -> Generator[Result, None, None]:
    """Yield every image of the source, or the error that it raised, in order."""

    def decode_chunk(start: int) -> list[Result]:
        indices = range(start, min(start + CHUNK, len(source)))
        return [_try_decode(source, index) for index in indices]

    starts = range(0, len(source), CHUNK)
    if workers is None:
        workers = available_cpus()
    if workers == 0:
        for start in starts:
            yield from decode_chunk(start)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    try:
        waiting: deque[Future[list[Result]]] = deque()
        for start in starts:
            waiting.append(pool.submit(decode_chunk, start))
            if len(waiting) > 2 * workers:  # bounds the memory
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _try_decode(source: Source, index: int) -> Result:
    try:
        image = source.decode(index)
        content = source.content(index) if hasattr(source, "content") else None
    except BadImageError as error:
        return error
    channels, dtype = pixel_format(source)
    if image.dtype != dtype or image.ndim != 3 or image.shape[0] != channels:
        raise TypeError(
            f"{source.name(index)}: decode gave {image.dtype} {image.shape}, "
            f"not {dtype} ({channels}, h, w)"
        )
    image = np.ascontiguousarray(image)
    pixel_hash = hash_pixels(image)
    content_hash = pixel_hash if content is None else hash_bytes(content)
    is_one_colour = dtype == "uint8" and bool(np.ptp(image, axis=(1, 2)).max() < NARROW_RANGE)
    return image, Entry(index, image.shape[1:], pixel_hash, content_hash, is_one_colour)


def hash_bytes(*parts: bytes | memoryview) -> int:
    """Hash ``parts`` to 64 bits."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return int.from_bytes(digest.digest(), "little")


def hash_pixels(image: np.ndarray) -> int:
    """Hash shape and pixels of a contiguous image ``(c, h, w)`` to 64 bits.

    Among a million images, two different ones share a hash with a probability of 3e-8.
    """
    return hash_bytes(np.array(image.shape, dtype="<i8").tobytes(), image.data)


# --- What is unusual about intact images


def describe_unusual(
    source: Source, entries: Sequence[Entry], too_small: Sequence[int]
) -> list[str]:
    """Report what was cut off, small images, images of one colour, and copies, a line for each.

    Args:
        source: all of its images are decoded.
        entries: the images in the cache.
        too_small: indices of the images that were left out because of their size.
    """
    kept = [entry.source_index for entry in entries]
    scaled_up = sorted(getattr(source, "scaled_up", set()).intersection(kept))
    one_colour = [entry.source_index for entry in entries if entry.is_one_colour]
    deep: set[int] = getattr(source, "deep", set()).intersection(one_colour)
    copies = [(kept[i], kept[k]) for i, k in _find_copies(entries)]
    in_other_class = sum(source.label(i) != source.label(k) for i, k in copies)
    side = min((min(entry.shape) for entry in entries), default=0)
    cut_by_index: dict[int, float] = getattr(source, "cut", {})
    cut: dict[tuple[int, int], list[float]] = {}
    for entry in entries:
        if entry.source_index in cut_by_index:
            height, width = entry.shape
            cut.setdefault((height, width), []).append(cut_by_index[entry.source_index])

    def names(indices: Sequence[int]) -> list[str]:
        return [source.name(index) for index in indices]

    def line(kind: str, found: Sequence[str], total: int, note: str = "") -> list[str]:
        first = ", ".join(found[:3]) + ", ..." * (len(found) > 3)
        return [f"{kind}: {len(found):,} of {total:,} images ({first}){note}"] if found else []

    few_values = (
        f"; {len(deep):,} of them have more than 8 bits but use few of the values: multiply these "
        f"in the files, by 16 where 12 bits are stored in 16"
    )
    classes_differ = f"; {in_other_class:,} of them are in another class"
    equal_names = [f"{source.name(i)} = {source.name(k)}" for i, k in copies]
    too_large = "their bucket" if cut else "image_size"
    return [
        *describe_cut(cut),
        *line("smaller than min_side, left out", names(too_small), len(source)),
        *line(
            f"smaller than {too_large}, scaled up",
            names(scaled_up),
            len(kept),
            "" if cut else f"; min_side={side} leaves them out",
        ),
        *line("nearly of one colour", names(one_colour), len(kept), few_values if deep else ""),
        *line("exact copies", equal_names, len(kept), classes_differ if in_other_class else ""),
    ]


def _find_copies(entries: Sequence[Entry]) -> np.ndarray:
    """Return pairs ``(n, 2)`` of places in ``entries``: each copy, and the first equal image."""
    hashes = np.array([entry.pixel_hash for entry in entries], dtype=np.uint64)
    _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    pairs = np.stack([np.arange(len(entries)), first[group]], axis=1)
    return pairs[pairs[:, 0] != pairs[:, 1]]
