"""Folders of image files as a source.

    item k = the k-th name in byte order        label = its top-level folder

Nothing is decoded to list it: the key hashes names and what ``stat`` says, so it costs no reading.
"""

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from sturdy.data.decode import DECODER, MAX_PIXELS, Crop, examine, read
from sturdy.data.layout import below, classes_of, count, summary, words
from sturdy.data.listing import ARCHIVES, SUFFIXES, Listing, printable
from sturdy.data.options import check_choice, check_colour, check_int, check_strings


class Folder:
    """The images under ``root``, at any depth; see ``Listing`` for what is left out.

    With ``labels="auto"`` every top-level folder is a class if there are at least two of them with
    images; images only in ``root`` itself, or only under one folder, are unlabelled; images both in
    ``root`` and in its folders are an error, and so are folders named like the parts of a data set
    (train, test; images, masks). ``True`` insists on classes (one will do), ``False`` takes all as
    unlabelled.

    Args:
        root: the folder, or several. Folders of the same name in several are one class; a name
            begins below the folder that all of them are in.
        size: of the decoded short side, in pixels.
        crop: ``"center"`` gives ``(3, size, size)``, ``"random"`` leaves the long side uncut.
        background: what shows through transparent pixels: a colour's name, or red, green and blue
            up to 255.
        labels: whether top-level folders are classes.
        max_pixels: most pixels an image may have; one with more is broken.
        min_side: fewest pixels of the short side; smaller images are left out. ``None``: they are
            scaled up.
        exclude: glob patterns of files and folders to leave out, relative to a root.
        any_suffix: whether to look for images in files with other suffixes or none.

    Attributes:
        scaled_up: indices of images decoded so far that were smaller than ``size``.
        deep: indices of those with more than 8 bits of grey.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such folder.
        ValueError: it has no images, its layout does not fit ``labels``, or an option is out of its
            range.
    """

    def __init__(
        self,
        *,
        root: str | os.PathLike[str] | int | Sequence[str | os.PathLike[str]],
        size: int = 64,
        crop: Crop = "center",
        background: str | Sequence[int] = "white",
        labels: bool | Literal["auto"] = "auto",
        max_pixels: int = MAX_PIXELS,
        min_side: int | None = None,
        exclude: Sequence[str] = (),
        any_suffix: bool = False,
    ) -> None:
        check_choice("data.crop", crop, get_args(Crop))
        self.labels = check_choice("data.labels", labels, ("auto", True, False))
        self.options: dict[str, Any] = {
            "size": check_int("data.image_size", size),
            "crop": crop,
            "background": check_colour("data.background", background),
            "max_pixels": check_int("data.max_pixels", max_pixels),
        }
        if size * size > max_pixels:
            raise ValueError(
                f"data.image_size={size} makes images of more than data.max_pixels={max_pixels:,}"
            )
        if min_side is not None:  # the keys of caches made without it stay what they are
            self.options["min_side"] = check_int("data.min_side", min_side)
        exclude = check_strings("data.exclude", exclude)
        any_suffix = check_choice("data.any_suffix", any_suffix, (True, False))
        self.roots = _folders(root)
        self.root = Path(os.path.commonpath(self.roots))

        listing = Listing(exclude, any_suffix=any_suffix)
        prefixes = [
            b"" if path == self.root else os.fsencode(path.relative_to(self.root)) + b"/"
            for path in self.roots
        ]
        for path, prefix in zip(self.roots, prefixes, strict=True):
            listing.add(os.fsencode(path), prefix)
        found = sorted(listing.images)
        if not found:
            raise ValueError(_nothing(self.roots, listing))
        classes = classes_of(self.roots, found, labels)
        self.classes = tuple(printable(name) for name in classes)
        number = {name: k for k, name in enumerate(classes)}
        self._labels = np.array([number.get(image.top, 0) for image in found], dtype=np.int64)
        # a million names are one string and their ends
        self._names = b"".join(image.name for image in found)
        self._ends = np.cumsum([0, *(len(image.name) for image in found)])
        self._understood = self._describe(listing, classes)
        self.scaled_up: set[int] = set()
        self.deep: set[int] = set()

        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr((DECODER, self.options, bool(classes))).encode())
        if len(self.roots) > 1:
            digest.update(
                repr(sorted(prefixes)).encode()
            )  # which folders are classes depends on them
        for image in found:
            digest.update(image.name + b"\0" + image.status)
        self.key = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._labels)

    def label(self, index: int) -> int:
        """The number of the class, 0 when unlabelled."""
        return int(self._labels[index])

    def name(self, index: int) -> str:
        """The path under ``root``; bytes that cannot be printed are escaped."""
        return printable(self._name(index))

    def decode(self, index: int) -> np.ndarray:
        """The image, uint8 ``(3, h, w)``; raises ``BadImageError``."""
        image = examine(self._path(index), **self.options)
        if image.side < self.options["size"]:
            self.scaled_up.add(index)
        if image.deep:
            self.deep.add(index)
        return image.pixels

    def content(self, index: int) -> bytes:
        """The bytes of the file; raises ``BadImageError``."""
        return read(self._path(index), most=16 * max(self.options["max_pixels"], MAX_PIXELS))

    def understood(self) -> list[str]:
        """What was taken for what, and what was left out or is not used; a line each."""
        return list(self._understood)

    def _path(self, index: int) -> str:
        return os.path.join(os.fspath(self.root), os.fsdecode(self._name(index)))

    def _name(self, index: int) -> bytes:
        index = range(len(self))[index]
        return self._names[self._ends[index] : self._ends[index + 1]]

    def _describe(self, listing: Listing, classes: list[bytes]) -> list[str]:
        images = listing.images
        where = " and ".join(printable(root) for root in self.roots)
        tops = count(image.top for image in images)
        lines = [f"{where}: {len(images):,} images, {summary(tops) if classes else 'no classes'}"]
        if (
            not classes
            and self.labels == "auto"
            and len(tops) == 1
            and (inner := below(images, tops))
        ):
            deeper = [
                root / os.fsdecode(top)
                for root in self.roots
                for top in tops
                if (root / os.fsdecode(top)).is_dir()
            ]
            lines[0] += f"; {words('data.root', deeper)} would make {len(inner):,} classes"
        empty = sorted(listing.tops - tops.keys()) if classes else []
        left_out = listing.left_out() + [
            f"the folder {printable(name)} (no images)" for name in empty[:8]
        ]
        if left_out:
            lines.append(f"left out: {', '.join(left_out)}")
        if texts := listing.texts():
            lines.append(f"not used, as only folders give classes: {', '.join(texts)}")
        if unmatched := listing.unmatched():
            lines.append(f"data.exclude matches nothing with {', '.join(unmatched)}")
        return lines


def _folders(root: Any) -> list[Path]:
    """The folders that ``data.root`` names, absolute; raises what is wrong with it in words."""
    given = root if isinstance(root, Sequence) and not isinstance(root, str) else [root]
    if not given:
        raise ValueError("data.root is empty: give the folder of your images")
    folders = [_folder(path) for path in given]
    real = [Path(os.path.realpath(path)) for path in folders]
    for i, outer in enumerate(real):
        for k, inner in enumerate(real):
            if i != k and (inner.is_relative_to(outer) or folders[k].is_relative_to(folders[i])):
                raise ValueError(
                    f"data.root: {printable(folders[k])} is "
                    f"{'the same folder as' if inner == outer else 'inside'} "
                    f"{printable(folders[i])}, and its images would count twice: give one of them"
                )
    return folders


def _folder(root: Any) -> Path:
    if not isinstance(root, str | os.PathLike):
        if (
            root is None or isinstance(root, bool) or not Path(str(root)).is_dir()
        ):  # 2024 is a good name of a folder
            raise ValueError(
                f"data.root={root} is not the name of a folder here; quote a name that is not read "
                f"as typed: "
                "'data.root=\"007\"'"
            )
        root = str(root)
    if not os.fspath(root):
        raise ValueError("data.root is empty: give the folder of your images")
    if re.match(r"[a-z][a-z0-9+.-]+://", os.fspath(root), re.IGNORECASE):
        raise ValueError(
            f"data.root={root} is not on this machine: download it, or mount it, and give that "
            f"folder"
        )
    path = Path(root).expanduser().absolute()
    if ".." in path.parts:
        path = path.resolve()
    try:
        if not path.exists():
            there = next(folder for folder in path.parents if folder.exists())
            raise FileNotFoundError(
                f"data.root={printable(path)} does not exist; the way there ends at "
                f"{printable(there)}"
            )
        if not path.is_dir():
            archive = path.suffix.lower().encode() in ARCHIVES
            what = (
                "an archive: unpack it, and give the folder"
                if archive
                else "a file, not a folder of images"
            )
            raise NotADirectoryError(f"data.root={printable(path)} is {what}")
    except OSError as error:
        if error.errno is None:
            raise
        raise type(error)(
            error.errno, f"data.root cannot be read ({error.strerror})", printable(path)
        ) from None
    return path


def _nothing(roots: Sequence[Path], listing: Listing) -> str:
    looked = " ".join(sorted(suffix.decode() for suffix in SUFFIXES))
    return (
        f"no images under {' and '.join(printable(root) for root in roots)} (data.root): looked "
        f"for {looked} in it and "
        f"its folders, and found {', '.join(listing.left_out(texts=True)) or 'no files at all'}"
    )
