"""Folders of image files as a source.

    image k = the k-th name in byte order        label = its top-level folder

To list the files, none is decoded: the key hashes their names, times and sizes.
"""

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from sturdy.data.checks import check_choice, check_colour, check_int, check_strings
from sturdy.data.decode import DECODER, MAX_PIXELS, Crop, decode_file, max_bytes, read_file
from sturdy.data.listing import (
    ARCHIVE_SUFFIXES,
    MAX_KINDS,
    SUFFIXES,
    Listing,
    as_override,
    count_classes_below,
    count_images,
    describe_classes,
    find_classes,
    printable,
    subfolders,
)


class Folder:
    """The images under ``root``, at any depth; ``Listing`` says what is left out.

    With ``labels="auto"`` every top-level folder is a class if at least two of them have images.
    Images only in ``root`` itself, or only under one folder, are unlabelled. Images both in
    ``root`` and in its folders are an error, and so are folders named like the parts of a data set
    (train, test; images, masks). ``True`` makes every folder a class, even if there is only one;
    ``False`` takes all images as unlabelled.

    Args:
        root: the folder, or several. Folders of the same name in several are one class. The names
            of images begin below the folder that all roots are in.
        image_size: the short side of the decoded images, in pixels.
        crop: ``"center"`` gives ``(3, image_size, image_size)``; ``"random"`` leaves the long side
            uncut.
        background: the colour behind transparent pixels: a name, or red, green and blue up to 255.
        labels: whether top-level folders are classes.
        max_pixels: most pixels an image may have; one with more is broken.
        min_side: fewest pixels of the short side; smaller images are left out. With ``None`` they
            are scaled up.
        exclude: glob patterns of files and folders to leave out, relative to a root.
        any_suffix: whether to look for images in files with other suffixes or none.

    Attributes:
        classes: the name of each class.
        key: changes with the files and with the way they are decoded.
        scaled_up: indices of images decoded so far that were smaller than ``image_size``.
        deep: indices of images decoded so far with more than 8 bits of grey.

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
        background: str | Sequence[int] = "white",
        labels: bool | Literal["auto"] = "auto",
        max_pixels: int = MAX_PIXELS,
        min_side: int | None = None,
        exclude: Sequence[str] = (),
        any_suffix: bool = False,
    ) -> None:
        self.labels = check_choice("labels", labels, ("auto", True, False))
        self.decoding: dict[str, Any] = {  # the key contains it: keep names and order
            "size": check_int("image_size", image_size),
            "crop": check_choice("crop", crop, get_args(Crop)),
            "background": check_colour("background", background),
            "max_pixels": check_int("max_pixels", max_pixels),
        }
        if image_size * image_size > max_pixels:
            raise ValueError(
                f"image_size={image_size} makes images of more than max_pixels={max_pixels:,}"
            )
        if min_side is not None:
            self.decoding["min_side"] = check_int("min_side", min_side)
        exclude = check_strings("exclude", exclude)
        any_suffix = check_choice("any_suffix", any_suffix, (True, False))
        self.roots = _check_roots(root)
        self.root = Path(os.path.commonpath(self.roots))

        listing = Listing(exclude, any_suffix=any_suffix)
        prefixes = [_prefix(path, self.root) for path in self.roots]
        for path, prefix in zip(self.roots, prefixes, strict=True):
            listing.add(os.fsencode(path), prefix)
        images = sorted(listing.images)
        if not images:
            raise ValueError(_describe_empty(self.roots, listing))
        classes = find_classes(self.roots, images, labels)
        self.classes = tuple(printable(name) for name in classes)
        class_index = {name: k for k, name in enumerate(classes)}
        self._labels = np.array([class_index.get(i.top, 0) for i in images], dtype=np.int64)
        # One string and the ends of the names, which takes little memory for a million names.
        self._names = b"".join(image.name for image in images)
        self._ends = np.cumsum([0, *(len(image.name) for image in images)])
        self._summary = self._describe(listing, classes)
        self.scaled_up: set[int] = set()
        self.deep: set[int] = set()

        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr((DECODER, self.decoding, bool(classes))).encode())
        if len(self.roots) > 1:  # the classes depend on the roots
            digest.update(repr(sorted(prefixes)).encode())
        for image in images:
            digest.update(image.name + b"\0" + image.status)
        self.key = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._labels)

    def label(self, index: int) -> int:
        """Return the index of the class, 0 when unlabelled."""
        return int(self._labels[index])

    def name(self, index: int) -> str:
        """Return the path under ``root``; bytes that cannot be printed are escaped."""
        return printable(self._raw_name(index))

    def decode(self, index: int) -> np.ndarray:
        """Return the image, uint8 ``(3, h, w)``.

        Raises:
            BadImageError: it cannot be used.
        """
        image = decode_file(self._path(index), **self.decoding)
        if image.short_side < self.decoding["size"]:
            self.scaled_up.add(index)
        if image.is_deep:
            self.deep.add(index)
        return image.pixels

    def content(self, index: int) -> bytes:
        """Return the bytes of the file.

        Raises:
            BadImageError: it cannot be read.
        """
        return read_file(self._path(index), max_bytes(self.decoding["max_pixels"]))

    def summary_lines(self) -> list[str]:
        """Say which images and classes were found, and what was left out or is not used."""
        return list(self._summary)

    def _path(self, index: int) -> str:
        return os.path.join(os.fspath(self.root), os.fsdecode(self._raw_name(index)))

    def _raw_name(self, index: int) -> bytes:
        index = range(len(self))[index]
        return self._names[self._ends[index] : self._ends[index + 1]]

    def _describe(self, listing: Listing, classes: list[bytes]) -> list[str]:
        images = listing.images
        tops = count_images(image.top for image in images)
        found = describe_classes(tops) if classes else "no classes"
        first = f"{_join(self.roots)}: {len(images):,} images, {found}"
        if not classes and self.labels == "auto" and len(tops) == 1:
            if inner := count_classes_below(images, tops):
                override = as_override("root", subfolders(self.roots, tops))
                first += f"; {override} would make {len(inner):,} classes"
        lines = [first]
        left_out = listing.left_out()
        if classes:
            empty = sorted(listing.tops - tops.keys())[:MAX_KINDS]
            left_out += [f"the folder {printable(name)} (no images)" for name in empty]
        if left_out:
            lines.append(f"left out: {', '.join(left_out)}")
        if texts := listing.texts():
            lines.append(f"not used, as only folders give classes: {', '.join(texts)}")
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


def _check_roots(root: Any) -> list[Path]:
    """Return the folders that ``root`` names, absolute.

    Raises:
        ValueError: they are no names of folders here, or one is inside another.
        OSError: a folder does not exist, or cannot be read.
    """
    given = root if isinstance(root, Sequence) and not isinstance(root, str) else [root]
    if not given:
        raise ValueError("root=[] is empty: give the folder of your images")
    folders = [_check_root(path) for path in given]
    real = [Path(os.path.realpath(path)) for path in folders]
    for i, outer in enumerate(real):
        for k, inner in enumerate(real):
            if i != k and (inner.is_relative_to(outer) or folders[k].is_relative_to(folders[i])):
                relation = "the same folder as" if inner == outer else "inside"
                raise ValueError(
                    f"root={printable(folders[k])} is {relation} {printable(folders[i])}, and its "
                    f"images would count twice: give one of them"
                )
    return folders


def _check_root(root: Any) -> Path:
    if not isinstance(root, str | os.PathLike):
        is_name = root is not None and not isinstance(root, bool) and Path(str(root)).is_dir()
        if not is_name:  # but 2024 may be the name of a folder
            raise ValueError(
                f"root={root} is not the name of a folder here; quote a name that is not read as "
                f"""typed: 'root="007"'"""
            )
        root = str(root)
    if not os.fspath(root):
        raise ValueError("root='' is empty: give the folder of your images")
    if re.match(r"[a-z][a-z0-9+.-]+://", os.fspath(root), re.IGNORECASE):
        raise ValueError(
            f"root={root} is not on this machine: download it, or mount it, and give that folder"
        )
    path = Path(root).expanduser().absolute()
    if ".." in path.parts:
        path = path.resolve()
    try:
        if not path.exists():
            existing = next(folder for folder in path.parents if folder.exists())
            raise FileNotFoundError(
                f"root={printable(path)} does not exist; the nearest folder that does is "
                f"{printable(existing)}"
            )
        if not path.is_dir():
            is_archive = path.suffix.lower().encode() in ARCHIVE_SUFFIXES
            archive = "an archive: unpack it, and give the folder"
            kind = archive if is_archive else "a file, not a folder of images"
            raise NotADirectoryError(f"root={printable(path)} is {kind}")
    except OSError as error:
        if error.errno is None:
            raise
        message = f"root={printable(path)} cannot be read ({error.strerror})"
        raise type(error)(error.errno, message) from None
    return path
