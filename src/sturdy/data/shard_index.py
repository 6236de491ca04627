"""The index of a set in shards: what every image is, and where its bytes lie.

A shard is a tar file in the layout of webdataset, and ``index.npz`` lies beside the shards. It is
one file of NumPy arrays, so that ten million images take no Python objects:

    samples               ``SAMPLE`` of each image, shard after shard
    names, name_ends      the bytes of all names, and where each one ends
    text                  JSON: shards, classes, captions, and the broken images

The broken images are in the index by name and reason only.
"""

import hashlib
import json
import os
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

INDEX = "index.npz"
LAYOUT = 1  # of the file; raise it whenever it changes

SAMPLE = np.dtype(
    [
        ("shard", "<u4"),
        ("offset", "<u8"),  # of the file of the image in the shard, in bytes
        ("size", "<u4"),  # of this file, in bytes
        ("content", "<u8"),  # the hash of its bytes
        ("height", "<u4"),  # of the upright image, in pixels
        ("width", "<u4"),
        ("label", "<i4"),
        ("caption", "<i4"),  # the row in the captions; their number if it is empty
    ]
)


class Shard(NamedTuple):
    """A shard: its file name, its size in bytes, and its time or tag, which changes with it."""

    name: str
    size: int
    mark: str


class Names(Sequence[str]):
    """Many names in two arrays.

    Args:
        text: all names, one after the other, in UTF-8, ``(bytes,)`` uint8.
        ends: where each name ends, ``(n,)`` int64.
    """

    def __init__(self, text: NDArray[np.uint8], ends: NDArray[np.int64]) -> None:
        self.text = text
        self.ends = ends

    @override
    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    @override
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        i = range(len(self))[index]
        start = self.ends[i - 1] if i else 0
        return bytes(self.text[start : self.ends[i]]).decode()

    def take(self, rows: NDArray[np.int64]) -> "Names":
        """Return the names at ``rows``, in that order."""
        if np.array_equal(rows, np.arange(len(self))):
            return self
        starts = np.concatenate([[0], self.ends[:-1]])[rows]
        lengths = self.ends[rows] - starts
        ends = np.cumsum(lengths)
        # Where each byte of the new text comes from.
        source = np.arange(ends[-1] if len(ends) else 0) + np.repeat(
            starts - (ends - lengths), lengths
        )
        return Names(self.text[source], ends)

    @classmethod
    def of(cls, names: Iterable[str]) -> "Names":
        """Return ``names`` in two arrays."""
        encoded = [name.encode() for name in names]
        ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), ends)

    @classmethod
    def join(cls, parts: Sequence["Names"]) -> "Names":
        """Return the names of all ``parts``, one part after the other."""
        sizes = np.cumsum([0, *(len(part.text) for part in parts)])
        ends = [part.ends + size for part, size in zip(parts, sizes[:-1], strict=True)]
        return cls(np.concatenate([part.text for part in parts]), np.concatenate(ends))


@dataclass
class ShardIndex:
    """What is known of the images in some shards without reading them.

    Attributes:
        samples: ``SAMPLE`` of each image that is whole, ``(n,)``.
        names: their names.
        shards: the shards.
        classes: the name of each class; empty when unlabelled.
        captions: the distinct captions, sorted, without the empty one; empty without captions.
        broken: names of the broken images, with the reasons.
        values: while a single shard is indexed, the class and the caption of each image, in place
            of rows; ``None`` where it has none. ``classes`` are then those of the broken images.
    """

    samples: NDArray[Any]
    names: Names
    shards: list[Shard]
    classes: list[Any] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    broken: list[tuple[str, str]] = field(default_factory=list)
    values: list[tuple[str | int | None, str | None]] = field(default_factory=list)

    def to_bytes(self) -> bytes:
        """Return the content of the file; the same for equal indices."""
        text = {
            "layout": LAYOUT,
            "shards": self.shards,
            "classes": self.classes,
            "captions": self.captions,
            "broken": self.broken,
            "values": self.values,
        }
        arrays = {
            "samples": self.samples,
            "names": self.names.text,
            "name_ends": self.names.ends,
            "text": np.frombuffer(json.dumps(text).encode(), dtype=np.uint8),
        }
        file = BytesIO()
        np.savez(file, allow_pickle=False, **arrays)
        return file.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> "ShardIndex":
        """Read the content of a file.

        Raises:
            ValueError: it is damaged, or of another layout.
        """
        try:
            with np.load(BytesIO(content), allow_pickle=False) as arrays:
                samples = arrays["samples"]
                names = Names(arrays["names"], arrays["name_ends"])
                text = json.loads(arrays["text"].tobytes())
            if text["layout"] != LAYOUT or samples.dtype != SAMPLE:
                raise ValueError(f"it is of layout {text['layout']}, and not {LAYOUT}")
            return cls(
                samples=samples,
                names=names,
                shards=[Shard(*shard) for shard in text["shards"]],
                classes=text["classes"],
                captions=text["captions"],
                broken=[(name, reason) for name, reason in text["broken"]],
                values=[(label, caption) for label, caption in text["values"]],
            )
        except (ValueError, KeyError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"damaged or of another version ({error})") from None

    def digest(self) -> str:
        """Hash everything in the index."""
        total = hashlib.sha256()
        for part in (self.samples, self.names.text, self.names.ends):
            total.update(np.ascontiguousarray(part).data.cast("B") if part.size else b"")
        text = [self.shards, self.classes, self.captions, self.broken]
        total.update(json.dumps(text).encode())
        return total.hexdigest()


def read_local_index(path: Path) -> ShardIndex | None:
    """Return the index in the file ``path``; None if it is missing or damaged."""
    try:
        return ShardIndex.from_bytes(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def join_indices(parts: Sequence[ShardIndex]) -> ShardIndex:
    """Return the index of all shards from those of the single shards, in their order.

    Classes are sorted by number where all are numbers, and else by name in byte order, as a
    folder's are.

    Raises:
        ValueError: some images have a class or a caption, and others have none; or some classes
            are numbers, and others are names.
    """
    samples = np.concatenate([part.samples for part in parts])
    samples["shard"] = np.repeat(np.arange(len(parts)), [len(part.samples) for part in parts])
    names = Names.join([part.names for part in parts])
    labels = {label for label, _ in _values(parts)}
    labels.update(label for part in parts for label in part.classes)
    classes = sorted(labels - {None}, key=_class_order)
    texts = sorted({caption for _, caption in _values(parts) if caption})
    has_captions = any(caption is not None for _, caption in _values(parts))
    if len({type(name) for name in classes}) > 1:
        raise ValueError(f"some classes are numbers, and others are names: {classes[0]}, ...")
    label_of = {name: k for k, name in enumerate(classes or [None])}
    caption_of: dict[str | None, int] = {text: k for k, text in enumerate(texts)}
    if not has_captions:
        caption_of[None] = 0
    caption_of[""] = len(texts)
    missing: list[str] = []
    for i, (label, caption) in enumerate(_values(parts)):
        if label not in label_of or caption not in caption_of:
            missing.append(f"{names[i]} has no {'caption' if label in label_of else 'class'}")
            continue
        samples["label"][i] = label_of[label]
        samples["caption"][i] = caption_of[caption]
    if missing:
        first = ", ".join(missing[:5])
        raise ValueError(
            f"{len(missing):,} images lack what others have: {first}: add it, or leave it out of "
            f"the index with label_column=null or caption_column=null"
        )
    return ShardIndex(
        samples,
        names,
        shards=[part.shards[0] for part in parts],
        classes=[str(name) for name in classes],
        captions=texts,
        broken=[broken for part in parts for broken in part.broken],
    )


def _values(parts: Sequence[ShardIndex]) -> Iterator[tuple[str | int | None, str | None]]:
    for part in parts:
        yield from part.values


def _class_order(name: str | int | None) -> tuple[int, bytes]:
    return (name, b"") if isinstance(name, int) else (-1, os.fsencode(str(name)))
