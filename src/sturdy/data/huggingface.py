"""Folders of Hugging Face's ``datasets``, and Parquet files, as a source.

    image k = row k of the files of one subset, in the order of their names

Only the files of the tables are read, from the disk: nothing is downloaded, converted or executed.
The key hashes the names, times and sizes of these files.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from functools import partial
from inspect import signature
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from sturdy.data.captions import fill_captions, sort_captions
from sturdy.data.checks import check_choice, check_text
from sturdy.data.classes import describe_classes
from sturdy.data.columns import (
    find_caption_column,
    find_image_column,
    find_label_column,
    label_choices,
)
from sturdy.data.datamodule import ImageData
from sturdy.data.decode import DECODER, MAX_PIXELS, Crop
from sturdy.data.decoding import DecodingSource
from sturdy.data.listing import MAX_KINDS, first_names, pack_status, printable
from sturdy.data.metadata import as_one_line
from sturdy.data.roots import check_table_root
from sturdy.data.table_files import find_table_files
from sturdy.data.table_rows import TableRows

INSTALL = "pip install 'sturdy-diffusion[huggingface]'"


class HuggingFace(DecodingSource):
    """The images in the rows of Parquet or Arrow files.

    A row has the bytes of an image file, as the package ``datasets`` writes them. Paths in rows are
    names, and never followed. Rows without a class are left out.

    Args:
        root: what ``save_to_disk`` wrote, a data set downloaded from the hub, a folder of Parquet
            files, or one such file.
        subset: the part of the data set, as in ``"train"``; ``None`` is the only one, or train.
        image_column: the column of the images; ``None`` is the only one.
        labels: whether there are classes: ``"auto"`` if one column has them, ``True`` must have
            them, ``False`` has none.
        label_column: the column of the classes; ``None`` is the only one of named classes, or
            ``label``.
        captions: whether to read captions.
        caption_column: the column of the captions; ``None`` is ``text``, or the only one of texts.
        caption: of images whose caption is null; ``{}`` in it is the class.
        image_size: as of ``DecodingSource``, and all that follow.
        crop: see there.
        background: see there.
        max_pixels: see there.
        min_side: see there.
        buckets: see there.

    Attributes:
        classes: the name of each class, in the order of the data set's numbers, or sorted.
        captions: the distinct captions, sorted; empty without.
        key: changes with the files, the chosen columns and the way the images are decoded.

    Raises:
        ValueError: the files or the columns cannot be used, or it is not clear which are meant.
        OSError: there is no such folder, or it cannot be read.
    """

    def __init__(
        self,
        *,
        root: str | os.PathLike[str],
        subset: str | None = None,
        image_column: str | None = None,
        labels: bool | Literal["auto"] = "auto",
        label_column: str | None = None,
        captions: bool = False,
        caption_column: str | None = None,
        caption: str | None = None,
        image_size: int = 64,
        crop: Crop = "center",
        background: str | Sequence[int] = "white",
        max_pixels: int = MAX_PIXELS,
        min_side: int | None = None,
        buckets: str | Sequence[str] | None = None,
    ) -> None:
        super().__init__(
            image_size=image_size,
            crop=crop,
            background=background,
            max_pixels=max_pixels,
            min_side=min_side,
            buckets=buckets,
        )
        check_choice("labels", labels, ("auto", True, False))
        check_choice("captions", captions, (True, False))
        for name, value in (("subset", subset), ("image_column", image_column)):
            check_text(name, value)
        for name, value in (("label_column", label_column), ("caption_column", caption_column)):
            check_text(name, value)
        if check_text("caption", caption) is not None and not captions:
            raise ValueError(f'caption="{caption}" is not used without captions=true')
        try:
            import pyarrow  # noqa: F401
        except ImportError as error:
            raise ValueError(f"Parquet and Arrow files need pyarrow ({error}): {INSTALL}") from None

        self.root = check_table_root(root)
        self.tables = find_table_files(self.root, subset)
        self.rows = TableRows(self.tables.files)
        schema = self.rows.schema
        self.image_column = find_image_column(schema, image_column)
        label = find_label_column(schema, label_column, labels)
        self._left_out: Counter[str] = Counter()
        self._used = [f"{self.image_column.name} (images)"]
        self._index = np.arange(len(self.rows))  # the row of each image
        self._labels = np.zeros(len(self.rows), dtype=np.int64)
        self.classes: tuple[str, ...] = ()
        if label:
            self._read_labels(label.name, label.classes)
            self._used.append(f"{label.name} (classes)")
        if not len(self._index):
            raise ValueError(
                f"root={printable(self.root)} has no rows with images"
                + "".join(f"; {n:,} {reason}" for reason, n in self._left_out.items())
            )
        self._names = self._read_names()
        self.captions: tuple[str, ...] = ()
        self._caption_lines: list[str] = []
        if captions:
            column = find_caption_column(schema, caption_column, label.name if label else "")
            self._read_captions(column, caption)
            self._used.append(f"{column} (captions)")
        self._summary = self._describe(labels, captions)
        self.key = self._hash()

    def __len__(self) -> int:
        return len(self._index)

    def label(self, index: int) -> int:
        """Return the index of the class, 0 when unlabelled."""
        return int(self._labels[index])

    def caption(self, index: int) -> int:
        """Return the row of the image's caption in ``captions``; their number if it is empty."""
        return int(self._caption_rows[index])

    def name(self, index: int) -> str:
        """Return the name of the image's file if each has another one, else its subset and row."""
        index = range(len(self))[index]
        if self._names is not None:
            return self._names[index]
        return f"{self.tables.subset or 'row'}/{self._index[index]:08d}"

    @override
    def read(self, index: int, limit: int) -> bytes:
        column = self.image_column
        return self.rows.read(int(self._index[index]), column.name, column.field, limit)

    def summary_lines(self) -> list[str]:
        """Say which images, classes and columns were found, and what was left out."""
        return list(self._summary)

    def _read_labels(self, column: str, names: tuple[str, ...]) -> None:
        """Set the classes of all rows, and leave out the rows without one."""
        values = self.rows.column(column).to_pylist()
        if names:
            known = range(len(names))
            has_class = [value in known for value in values]
        else:
            has_class = [value is not None and value != "" for value in values]
            present = sorted({value for value in values if value not in (None, "")})
            names = tuple(str(value) for value in present)
            number = {value: k for k, value in enumerate(present)}
            values = [number.get(value) for value in values]
        self._index = np.flatnonzero(has_class)
        if missing := len(values) - len(self._index):
            self._left_out[f"rows without a class in {column}"] = missing
        labels = np.array([values[row] for row in self._index], dtype=np.int64)
        used, self._labels = np.unique(labels, return_inverse=True)  # in the order of the names
        if unused := len(names) - len(used):
            self._left_out["classes without images"] = unused
        self.classes = tuple(printable(os.fsencode(names[k])) for k in used)

    def _read_names(self) -> list[str] | None:
        """Return the name of each image's file; ``None`` if some have none or the same."""
        if not self.image_column.path:
            return None
        paths = self.rows.column(self.image_column.name, self.image_column.path).to_pylist()
        names = [printable(_last_part(paths[row] or "")) for row in self._index]
        return names if len({*names, ""}) == len(names) + 1 else None

    def _read_captions(self, column: str, template: str | None) -> None:
        values = self.rows.column(column).to_pylist()
        texts = [values[row] for row in self._index]
        captions = [None if text is None else as_one_line(text) for text in texts]
        counts = Counter({column: len(captions) - captions.count(None)})
        fill_captions(
            captions,
            template,
            [self.classes[k] for k in self._labels] if self.classes else [],
            counts,
        )
        if missing := captions.count(None):
            raise ValueError(
                f"captions=true, and {missing:,} of {len(captions):,} images have no caption in "
                f"{column}: give them one with 'caption=\"a photo\"'"
            )
        found = sort_captions(captions, counts)
        self.captions = found.texts
        self._caption_rows: NDArray[np.int64] = found.rows
        self._caption_lines = found.lines

    def _describe(self, labels: bool | str, captions: bool) -> list[str]:
        counts = np.bincount(self._labels, minlength=len(self.classes)).tolist()
        classes = Counter(
            {os.fsencode(name): n for name, n in zip(self.classes, counts, strict=False)}
        )
        subset = f", {self.tables.subset}" if self.tables.subset else ""
        files = f"{len(self.tables.files):,} file{'s' * (len(self.tables.files) > 1)}"
        lines = [
            f"{printable(self.root)} ({files}{subset}): {len(self):,} images, "
            f"{describe_classes(classes)}"
        ]
        line = f"columns: {', '.join(self._used)}"
        used = {text.rpartition(" ")[0] for text in self._used}
        if rest := [name for name in self.rows.schema.names if name not in used]:
            line += f"; not used: {first_names(rest, MAX_KINDS)}"
        if not self.classes and labels == "auto":
            if choices := [name for name in label_choices(self.rows.schema) if name not in used]:
                line += f"; label_column=NAME reads classes from {first_names(choices, MAX_KINDS)}"
        lines += [line, *self._caption_lines]
        left_out = [f"{n:,} {reason}" for reason, n in self._left_out.items()]
        left_out += [f"the subset {name or 'without a name'}" for name in self.tables.others]
        if left_out:
            lines.append(f"left out: {', '.join(left_out)}")
        return lines

    def _hash(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr((DECODER, self.decoding, self.image_column)).encode())
        for file in self.tables.files:
            name = os.path.relpath(file, self.root)
            digest.update(os.fsencode(name) + b"\0" + pack_status(file.stat()))
        digest.update(json.dumps([self.classes, self.captions]).encode())
        digest.update(self._index.tobytes() + self._labels.tobytes())
        if self.captions:
            digest.update(self._caption_rows.tobytes())
        return digest.hexdigest()


def _last_part(path: str) -> bytes:
    return os.path.basename(path.replace("\\", "/")).encode("utf-8", "surrogateescape")


def huggingface_data(*, root: str, image_size: int = 64, **others: Any) -> ImageData:
    """Return ``ImageData`` of ``HuggingFace``, with the arguments of both side by side.

    Args:
        root: the folder of the data set, or a Parquet file.
        image_size: height and width of the images, in pixels.
        **others: further arguments of ``HuggingFace`` and of ``ImageData``.
    """
    names = signature(HuggingFace).parameters
    of_source = {name: value for name, value in others.items() if name in names}
    of_data = {name: value for name, value in others.items() if name not in names}
    read_tables = partial(HuggingFace, root=root, image_size=image_size, **of_source)
    buckets = others.get("buckets") is not None
    return ImageData(read_tables, image_size=image_size, buckets=buckets, **of_data)
