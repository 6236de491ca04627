"""A set in shards as a source: known from its index, and read at every use.

image k = the k-th whole image of the index: shard after shard, as they lie in each
"""

import hashlib
import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from exact_resume.files import fsync_directory
from sturdy.data.cache_writer import Quarantine, save_tables
from sturdy.data.checks import check_choice, check_colour, check_int
from sturdy.data.decode import DECODER, MAX_PIXELS, RGB, Crop, decode_file, resized_shape
from sturdy.data.shard_index import INDEX, ShardIndex
from sturdy.data.shard_store import ShardStore
from sturdy.data.source import PixelFormat
from sturdy.data.streamed_images import write_places

DECODERS = ("numpy", "pillow", "simplejpeg", "torch")  # packages that may change a pixel
MAX_COPIES = 3  # that a remark names


class Shards:
    """The images in the shards in ``root``, in the order of the index.

    Args:
        root: a folder or a URL with shards and their index.
        image_size: the short side of the decoded images, in pixels.
        crop: as of ``Folder``, and so are the next two.
        background: as of ``Folder``.
        min_side: as of ``Folder``.
        labels: whether the classes in the index are used; ``"auto"`` means if there are any.
        captions: whether its captions are used.

    Attributes:
        store: where the shards are.
        index: what is known of them.
        classes: the name of each class.
        captions: the distinct captions.
        key: changes with the index, with where it is, and with the way images are decoded.

    Raises:
        FileNotFoundError: there is no such folder, or no index in it.
        ValueError: the index is damaged, it lacks what is asked for, or an argument is out of its
            range.
        ShardError: the store cannot be read.
    """

    def __init__(
        self,
        *,
        root: str | os.PathLike[str],
        image_size: int = 64,
        crop: Crop = "center",
        background: str | RGB = "white",
        min_side: int | None = None,
        labels: bool | Literal["auto"] = "auto",
        captions: bool = False,
    ) -> None:
        self.decoding: dict[str, Any] = {
            "size": check_int("image_size", image_size),
            "crop": check_choice("crop", crop, get_args(Crop)),
            "background": check_colour("background", background),
            "max_pixels": MAX_PIXELS,
        }
        self.min_side = 0 if min_side is None else check_int("min_side", min_side)
        check_choice("labels", labels, ("auto", True, False))
        check_choice("captions", captions, (True, False))
        self.store = ShardStore(root)
        self.index = self._read_index()
        if labels is True and not self.index.classes:
            raise ValueError(f"labels=true needs classes, and {self.store.root} has none")
        if captions and not self.index.captions:
            raise ValueError(f"captions=true needs captions, and {self.store.root} has none")
        self.classes = tuple(self.index.classes if labels else ())
        self.captions = tuple(self.index.captions if captions else ())
        self._names = self.index.names
        self._broken = self.index.broken
        packages = [version(name) for name in DECODERS]
        parts = [self.store.root, self.index.digest(), DECODER, packages, self.decoding]
        parts += [self.min_side, self.classes, bool(self.captions)]
        self.key = hashlib.sha256(json.dumps(["shards", *parts]).encode()).hexdigest()

    def __len__(self) -> int:
        """Return the number of all images; the broken ones come last."""
        return len(self._names) + len(self._broken)

    def label(self, index: int) -> int:
        """Return the index of the class, 0 when unlabelled."""
        is_known = bool(self.classes) and index < len(self._names)
        return int(self.index.samples["label"][index]) if is_known else 0

    def caption(self, index: int) -> int:
        """Return the row of the image's caption in ``captions``; their number if it is empty."""
        rows = self.index.samples["caption"]
        return int(rows[index]) if index < len(rows) else len(self.captions)

    def name(self, index: int) -> str:
        """Return the name of the image, as it was in the folder that the shards were made of."""
        whole = len(self._names)
        return self._names[index] if index < whole else self._broken[index - whole][0]

    def decode(self, index: int) -> np.ndarray:
        """Return the image, uint8 ``(3, h, w)``.

        Raises:
            ShardError: it cannot be read.
        """
        sample = self.index.samples[index]
        shard = self.index.shards[sample["shard"]].name
        content = self.store.read(shard, int(sample["offset"]), int(sample["size"]))
        return decode_file(content, **self.decoding).pixels

    def summary_lines(self) -> list[str]:
        """Say how many images and shards there are."""
        images = f"{len(self):,} images in {len(self.index.shards):,} shards"
        classes = f"{len(self.classes):,} classes" if self.classes else "no classes"
        lines = [f"{self.store.root}: {images}, {classes}; read at every use, and not cached"]
        if self.index.classes and not self.classes:
            lines.append(f"labels=true would use {len(self.index.classes):,} classes")
        if self.index.captions and not self.captions:
            lines.append(f"captions=true would use {len(self.index.captions):,} captions")
        return lines

    def write_tables(self, path: Path) -> Quarantine:
        """Write the cache of ``StreamedImages`` into the new folder ``path``, durably.

        Nothing is read but the pixels of a few images.

        Returns:
            the broken images.

        Raises:
            ValueError: no image is left.
            ShardError: the store cannot be read.
        """
        samples = self.index.samples
        height, width = samples["height"].astype("i8"), samples["width"].astype("i8")
        size = self.decoding["size"]
        shapes = np.stack(resized_shape(height, width, (size, size)), axis=1)
        is_small = np.minimum(height, width) < self.min_side
        is_long = (shapes.prod(axis=1) > MAX_PIXELS) & ~is_small
        kept = np.flatnonzero(~is_small & ~is_long)
        if not len(kept):
            raise ValueError(
                f"no image is left: of {len(self):,}, {is_small.sum():,} are smaller than min_side"
            )
        if self.decoding["crop"] == "center":
            shapes[:] = self.decoding["size"]
        shapes = shapes[kept]
        of_kept = samples[kept]
        quarantine = list(self._broken)
        quarantine += [
            (self.name(i), "too many pixels after the resize")
            for i in np.flatnonzero(is_long).tolist()
        ]
        path.mkdir()
        stream = write_places(
            path,
            self.store.root,
            self.index.shards,
            self.decoding,
            of_kept,
            self._names.take(kept),
            shapes,
        )
        digest = hashlib.sha256(b"stream")
        digest.update(json.dumps([self.decoding, stream["probe"]]).encode())
        digest.update(shapes.astype("<i8").tobytes() + of_kept["content"].tobytes())
        save_tables(
            path,
            key=self.key,
            classes=self.classes,
            labels=of_kept["label"].astype("i8") * bool(self.classes),
            shapes=shapes,
            contents=np.ascontiguousarray(of_kept["content"]),
            captions=self.captions,
            rows=of_kept["caption"].astype("<i8") if self.captions else None,
            quarantine=quarantine,
            small=[self.name(i) for i in np.flatnonzero(is_small).tolist()],
            remarks=self._describe_unusual(kept),
            pixels=PixelFormat(),
            digest=digest,
            stream=stream,
        )
        fsync_directory(path)
        return quarantine

    def _read_index(self) -> ShardIndex:
        try:
            return ShardIndex.from_bytes(self.store.read_file(INDEX))
        except FileNotFoundError:
            raise FileNotFoundError(
                f"root={self.store.root} has no {INDEX}: make one with `python -m "
                f"sturdy.data.shards index {self.store.root}`, or shards of a folder of images "
                f"with `pack` in place of `index`"
            ) from None
        except ValueError as error:
            raise ValueError(
                f"root={self.store.root}: {INDEX} is {error}; make it again with `python -m "
                f"sturdy.data.shards index {self.store.root}`"
            ) from None

    def _describe_unusual(self, kept: np.ndarray) -> list[str]:
        """Report images that are scaled up, and exact copies, a line for each if there are any."""
        samples = self.index.samples[kept]
        short = np.minimum(samples["height"], samples["width"])
        _, first = np.unique(samples["content"], return_index=True)
        is_copy = np.ones(len(kept), dtype=bool)
        is_copy[first] = False
        lines = []
        for kind, rows in (
            ("smaller than image_size, scaled up", short < self.decoding["size"]),
            ("exact copies", is_copy),
        ):
            found = kept[rows].tolist()
            if found:
                names = ", ".join(self.name(i) for i in found[:MAX_COPIES])
                dots = ", ..." * (len(found) > MAX_COPIES)
                lines.append(f"{kind}: {len(found):,} of {len(kept):,} images ({names}{dots})")
        return lines
