"""Read shards from end to end, and make their index.

What belongs to one sample is decided by webdataset: files in a row with the same name up to its
first dot. Nothing in a shard is executed: images are decoded by ``decode``, and of the other files
only ``.json``, ``.cls`` and ``.txt`` are read, as texts.
"""

import json
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from exact_resume.files import atomic_write, make_directory
from exact_resume.system import available_cpus
from sturdy.data.cache_writer import hash_bytes
from sturdy.data.checks import check_text
from sturdy.data.decode import MAX_PIXELS, decode_file, max_bytes
from sturdy.data.listing import SUFFIXES, printable
from sturdy.data.shard_index import (
    INDEX,
    SAMPLE,
    Names,
    Shard,
    ShardIndex,
    join_indices,
    read_local_index,
)
from sturdy.data.shard_store import ShardStore
from sturdy.data.source import BadImageError

PARTS = "index-parts"  # the folder with the index of each shard
CHECK_SIZE = 64  # pixels; every image is decoded to this size to find the broken ones
MAX_TEXT = 2**20  # bytes of a text beside an image
ANY_IMAGE = "img"  # the suffix of an image whose own suffix does not tell its format
TEXTS = ("cls", "json", "txt")  # suffixes of the texts that are read


class _Image(NamedTuple):
    """What was found out about an image."""

    offset: int
    size: int
    content: int
    height: int
    width: int
    error: str = ""  # why it cannot be used


def index_shards(
    store: ShardStore,
    out: Path,
    *,
    label_column: str | None = "class",
    caption_column: str | None = "text",
    suffix: str | None = None,
    progress: Callable[[int, int], None],
) -> ShardIndex:
    """Read all shards of ``store``, and write their index into ``out``.

    Args:
        store: the shards.
        out: a folder. A shard that was indexed there and is as it was then is not read again.
        label_column: the key of ``.json`` with the class, which else is ``.cls``; ``None``: no
            classes.
        caption_column: the key of ``.json`` with the caption of an image without ``.txt``;
            ``None``: no captions.
        suffix: of the images, where samples have several.
        progress: called with ``(done, total)``.

    Raises:
        ValueError: there are no shards, one is no tar file, or what they have does not fit.
        ShardError: they cannot be read.
    """
    check_text("label_column", label_column)
    check_text("caption_column", caption_column)
    check_text("suffix", suffix)
    shards = store.shards()
    if not shards:
        raise ValueError(
            f"{store.root} has no shards: no .tar file lies directly in it (compressed ones cannot "
            f"be read at any place: decompress them)"
        )
    options = json.dumps([label_column, caption_column, suffix]).encode()
    parts = out / PARTS / f"{hash_bytes(options):016x}"
    make_directory(parts)

    def index_one(shard: Shard) -> ShardIndex:
        path = parts / f"{shard.name}.npz"
        known = read_local_index(path)
        if known and known.shards == [shard]:
            return known
        found = _index_shard(store, shard, label_column, caption_column, suffix)
        with atomic_write(path, unique=True) as file:
            file.write(found.to_bytes())
        return found

    done: list[ShardIndex] = []
    with ThreadPoolExecutor(available_cpus(), thread_name_prefix="index") as pool:
        try:
            for part in pool.map(index_one, shards):
                done.append(part)
                progress(len(done), len(shards))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    whole = join_indices(done)
    with atomic_write(out / INDEX, unique=True) as file:
        file.write(whole.to_bytes())
    return whole


def _index_shard(
    store: ShardStore,
    shard: Shard,
    label_column: str | None,
    caption_column: str | None,
    suffix: str | None,
) -> ShardIndex:
    rows: list[tuple[int, ...]] = []
    names: list[str] = []
    values: list[tuple[str | int | None, str | None]] = []
    broken: list[tuple[str, str]] = []
    classes: list[str | int | None] = []
    for sample in _samples(store, shard.name):
        about = _parse(sample.get("json", b""))
        ending, image = _find_image(sample, suffix)
        name = str(about.get("name") or _printable(f"{shard.name}/{sample['__key__']}.{ending}"))
        label = _find_class(sample, about, label_column)
        if image is None or image.error:
            reason = about.get("broken") or "a sample without an image"
            broken.append((name, image.error if image else str(reason)))
            classes.append(label)
            continue
        rows.append((0, *image[:5], 0, 0))
        names.append(name)
        values.append((label, _find_caption(sample, about, caption_column)))
    return ShardIndex(
        np.array(rows, dtype=SAMPLE), Names.of(names), [shard], classes, [], broken, values
    )


def _samples(store: ShardStore, name: str) -> Iterator[dict[str, Any]]:
    """Yield the samples of a shard: ``_Image`` or bytes by suffix, and ``__key__``."""
    from webdataset.tariterators import group_by_keys

    try:
        with store.open(name) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            yield from group_by_keys(_files(tar, name))
    except tarfile.TarError as error:
        raise ValueError(
            f"{store.root}: {name} is no tar file, or is compressed or damaged ({error})"
        ) from None
    except ValueError as error:  # webdataset appends what is not for people
        raise ValueError(f"{store.root}: {name}: {error.args[0]}") from None


def _files(tar: tarfile.TarFile, shard: str) -> Iterator[dict[str, Any]]:
    """Yield the regular files of a shard as webdataset takes them; those of images are decoded."""
    for member in tar:
        suffix = member.name.rpartition(".")[2].lower()
        data: bytes | _Image = b""
        if not member.isreg() or member.issparse():
            continue
        file = tar.extractfile(member)
        assert file is not None
        if is_image_suffix(suffix):
            data = _check_image(file, member.offset_data, member.size)
        elif suffix in TEXTS and member.size <= MAX_TEXT:
            data = file.read()
        yield {"fname": member.name, "data": data, "__url__": shard}


def is_image_suffix(suffix: str) -> bool:
    """Return whether files with this suffix, without the dot, are images."""
    return suffix == ANY_IMAGE or f".{suffix}".encode() in SUFFIXES


def _check_image(file: IO[bytes], offset: int, size: int) -> _Image:
    """Decode an image to find out whether it is whole, and its size."""
    if size > max_bytes(MAX_PIXELS):
        return _Image(offset, 0, 0, 0, 0, f"{size / 1e6:,.0f} MB are over the limit")
    content = file.read()
    try:
        image = decode_file(content, CHECK_SIZE, "random", (255, 255, 255), MAX_PIXELS)
    except BadImageError as error:
        return _Image(offset, size, 0, 0, 0, str(error))
    return _Image(offset, size, hash_bytes(content), image.height, image.width)


def _find_image(sample: dict[str, Any], suffix: str | None) -> tuple[str, _Image | None]:
    """Return the suffix and what was found out about the image of a sample; None without one.

    Raises:
        ValueError: there are several.
    """
    found = {name: data for name, data in sample.items() if isinstance(data, _Image)}
    if suffix is not None:
        return suffix, found.get(suffix)
    if len(found) > 1:
        raise ValueError(
            f"the sample {sample['__key__']} has several images ({', '.join(found)}): say which, "
            f"as in suffix={next(iter(found))}"
        )
    return next(iter(found.items()), ("", None))


def _find_class(
    sample: dict[str, Any], about: dict[str, Any], label_column: str | None
) -> str | int | None:
    if label_column is None:
        return None
    if (value := about.get(label_column)) is not None:
        return value if isinstance(value, int) else str(value)
    text = _text(sample["cls"]) if "cls" in sample else None
    return int(text) if text and text.isdecimal() else text


def _find_caption(
    sample: dict[str, Any], about: dict[str, Any], caption_column: str | None
) -> str | None:
    if caption_column is None:
        return None
    if "txt" in sample:
        return _text(sample["txt"])
    value = about.get(caption_column)
    return None if value is None else " ".join(str(value).split())


def _printable(name: str) -> str:
    return printable(name.encode("utf-8", "surrogateescape"))


def _text(content: bytes) -> str:
    return " ".join(content.decode("utf-8", "backslashreplace").split())


def _parse(content: bytes) -> dict[str, Any]:
    """Return the object in a JSON file; empty where there is none."""
    try:
        about = json.loads(content or b"{}")
    except ValueError:
        return {}
    return about if isinstance(about, dict) else {}
