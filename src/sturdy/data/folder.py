"""Folders of image files as a source, also in archives.

    image k = the k-th name in byte order        label = its top-level folder, or a column

To list the files, none is decoded: the key hashes their names, times and sizes.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from typing_extensions import override

from sturdy.data.captions import read_captions
from sturdy.data.checks import check_choice, check_strings, check_text
from sturdy.data.classes import (
    as_override,
    count_classes_below,
    count_images,
    describe_classes,
    find_classes,
    subfolders,
)
from sturdy.data.decode import DECODER, MAX_PIXELS, Crop
from sturdy.data.decoding import DecodingSource
from sturdy.data.listing import MAX_KINDS, SUFFIXES, Listing, printable
from sturdy.data.metadata import describe_unused_texts, read_labels
from sturdy.data.roots import check_roots, open_archives


class Folder(DecodingSource):
    """The images under ``root``, at any depth; ``Listing`` says what is left out.

    With ``labels="auto"`` every top-level folder is a class if at least two of them have images.
    Images only in ``root`` itself, or only under one folder, are unlabelled. Images both in
    ``root`` and in its folders are an error, and so are folders named like the parts of a data set
    (train, test; images, masks). ``True`` makes every folder a class, even if there is only one;
    ``False`` takes all images as unlabelled. With ``label_column``, a table has the classes and
    folders are none.

    Args:
        root: the folder, or several. A zip or tar archive, or a folder in one, counts as a folder.
            Folders of the same name in several are one class. The names of images begin below the
            folder that all roots are in.
        image_size: the short side of the decoded images, in pixels.
        crop: ``"center"`` gives ``(3, image_size, image_size)``; ``"random"`` leaves the long side
            uncut.
        buckets: heights and widths such as ``["64x64", "48x80"]``, or ``"auto"``. Each image is cut
            to the one whose ratio is nearest; see ``sturdy.data.buckets.parse_buckets``.
        background: the colour behind transparent pixels: a name, or red, green and blue up to 255.
        labels: whether top-level folders are classes.
        max_pixels: most pixels an image may have; one with more is broken.
        min_side: fewest pixels of the short side; smaller images are left out. With ``None`` they
            are scaled up.
        exclude: glob patterns of files and folders to leave out, relative to a root.
        any_suffix: whether to look for images in files with other suffixes or none.
        label_column: the column of ``metadata.csv`` or ``metadata.jsonl`` with the classes.
        captions: whether to read captions; see ``sturdy.data.captions``.
        caption_column: the column of these tables with the captions; ``None`` does not read them.
        caption: of images without another; ``{}`` in it is the class.

    Attributes:
        classes: the name of each class.
        captions: the distinct captions, sorted; empty without.
        key: changes with the files and with the way they are decoded.
        scaled_up: indices of images decoded so far that were smaller than they are now.
        deep: indices of images decoded so far with more than 8 bits of grey.
        cut: with ``buckets``, the share of each image decoded so far that was cut off, by index.

    Raises:
        FileNotFoundError: there is no such folder.
        NotADirectoryError: it is a file.
        ValueError: it has no images, its folders do not fit ``labels``, or an argument is out of
            its range.
    """

    def __init__(
        self,
        *,
        root: str | os.PathLike[str] | int | Sequence[str | os.PathLike[str]],
        image_size: int = 64,
        crop: Crop = "center",
        buckets: Sequence[str] | str | None = None,
        background: str | Sequence[int] = "white",
        labels: bool | Literal["auto"] = "auto",
        max_pixels: int = MAX_PIXELS,
        min_side: int | None = None,
        exclude: Sequence[str] = (),
        any_suffix: bool = False,
        label_column: str | None = None,
        captions: bool = False,
        caption_column: str | None = "text",
        caption: str | None = None,
    ) -> None:
        self.labels = check_choice("labels", labels, ("auto", True, False))
        label_column = check_text("label_column", label_column)
        if label_column is not None and labels is True:
            raise ValueError(
                f"labels=true takes folders as classes, and label_column={label_column} a column: "
                f"leave out one of them"
            )
        check_choice("captions", captions, (True, False))
        caption_column = check_text("caption_column", caption_column)
        caption = check_text("caption", caption)
        if caption is not None and not captions:
            raise ValueError(f'caption="{caption}" is not used without captions=true')
        super().__init__(
            image_size=image_size,
            crop=crop,
            background=background,
            max_pixels=max_pixels,
            min_side=min_side,
            buckets=buckets,
        )
        exclude = check_strings("exclude", exclude)
        any_suffix = check_choice("any_suffix", any_suffix, (True, False))
        self.roots = check_roots(root)
        self.root = Path(os.path.commonpath(self.roots))
        self.files = open_archives(self.roots)

        listing = Listing(self.files, exclude, any_suffix=any_suffix, keep_texts=captions)
        prefixes = [_prefix(path, self.root) for path in self.roots]
        for path, prefix in zip(self.roots, prefixes, strict=True):
            listing.add(os.fsencode(path), prefix)
        images = sorted(listing.images)
        if not images:
            raise ValueError(_describe_empty(self.roots, listing))
        tables = sorted(listing.tables)
        names = [image.name for image in images]
        notes: list[str] = []
        if label_column is None:
            classes = find_classes(self.files, self.roots, images, labels)
            values = [image.top for image in images]
        else:
            values, column = read_labels(label_column, tables, names)
            classes = sorted(set(values))
            notes += column.notes()
            listing.use(column.tables)
        self.classes = tuple(printable(name) for name in classes)
        class_index = {name: k for k, name in enumerate(classes)}
        self._labels = np.array([class_index.get(value, 0) for value in values], dtype=np.int64)
        # One string and the ends of the names, which takes little memory for a million names.
        self._names = b"".join(names)
        self._ends = np.cumsum([0, *(len(name) for name in names)])
        self.captions: tuple[str, ...] = ()
        if captions:
            found = read_captions(
                names,
                column=caption_column,
                template=caption,
                tables=tables,
                texts=listing.text_files,
                classes=[self.classes[k] for k in self._labels] if classes else [],
            )
            self.captions = found.texts
            self._caption_rows = found.rows
            notes = [*found.lines, *notes]
            listing.use(found.used)
        self._summary = self._describe(listing, values, label_column, list(dict.fromkeys(notes)))

        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr((DECODER, self.decoding, bool(classes))).encode())
        if len(self.roots) > 1:  # the classes depend on the roots
            digest.update(repr(sorted(prefixes)).encode())
        for image in images:
            digest.update(image.name + b"\0" + image.status)
        if label_column is not None:
            digest.update(json.dumps(["labels", self.classes, self._labels.tolist()]).encode())
        if captions:
            rows = self._caption_rows.tolist()
            digest.update(json.dumps(["captions", self.captions, rows]).encode())
        self.key = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._labels)

    def label(self, index: int) -> int:
        """Return the index of the class, 0 when unlabelled."""
        return int(self._labels[index])

    def caption(self, index: int) -> int:
        """Return the row of the image's caption in ``captions``; their number if it is empty."""
        return int(self._caption_rows[index])

    def name(self, index: int) -> str:
        """Return the path under ``root``; bytes that cannot be printed are escaped."""
        return printable(self._raw_name(index))

    @override
    def read(self, index: int, limit: int) -> bytes:
        return self.files.read(os.path.join(os.fsencode(self.root), self._raw_name(index)), limit)

    def summary_lines(self) -> list[str]:
        """Say which images and classes were found, and what was left out or is not used."""
        return list(self._summary)

    def _raw_name(self, index: int) -> bytes:
        index = range(len(self))[index]
        return self._names[self._ends[index] : self._ends[index + 1]]

    def _describe(
        self, listing: Listing, values: list[bytes], label_column: str | None, notes: list[str]
    ) -> list[str]:
        images = listing.images
        tops = count_images(values)  # the folders of the images, or their values in the column
        found = describe_classes(tops) if self.classes else "no classes"
        first = f"{_join(self.roots)}: {len(images):,} images, {found}"
        if label_column is not None:
            first += f" (label_column={label_column})"
        if not self.classes and self.labels == "auto" and len(tops) == 1:
            if inner := count_classes_below(images, tops):
                override = as_override("root", subfolders(self.files, self.roots, tops))
                first += f"; {override} would make {len(inner):,} classes"
        lines = [first, *notes]
        left_out = listing.left_out()
        if self.classes and label_column is None:
            empty = sorted(listing.tops - tops.keys())[:MAX_KINDS]
            left_out += [f"the folder {printable(name)} (no images)" for name in empty]
        if left_out:
            lines.append(f"left out: {', '.join(left_out)}")
        lines += describe_unused_texts(
            listing, has_captions=bool(self.captions), has_column=label_column is not None
        )
        if unmatched := listing.unmatched():
            lines.append(f"exclude=[{','.join(unmatched)}] matches nothing")
        return lines


def _prefix(path: Path, root: Path) -> bytes:
    return b"" if path == root else os.fsencode(path.relative_to(root)) + b"/"


def _join(roots: Sequence[Path]) -> str:
    return " and ".join(printable(root) for root in roots)


def _describe_empty(roots: Sequence[Path], listing: Listing) -> str:
    suffixes = " ".join(sorted(suffix.decode() for suffix in SUFFIXES))
    found = ", ".join(listing.left_out(texts=True)) or "no files at all"
    return (
        f"{as_override('root', roots)} has no images: looked for {suffixes} in it and its folders, "
        f"and found {found}"
    )
