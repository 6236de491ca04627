"""A folder of image files as a source.

    item k = the k-th name in byte order under root        label = its top-level folder

Nothing is opened to list it: the key hashes names and what ``stat`` says, so it costs no reading.
"""

import hashlib
import os
import stat
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from sturdy.data.decode import DECODER, MAX_PIXELS, Crop, decode, read
from sturdy.data.options import colour, one_of, whole

SUFFIXES = frozenset({b".bmp", b".gif", b".jfif", b".jpe", b".jpeg", b".jpg", b".png", b".tif", b".tiff", b".webp"})
HIDDEN = b"/"  # counted beside the suffixes; no suffix is like it


class Folder:
    """The images under ``root``, at any depth, hidden files and folders left out; links are followed.

    With ``labels="auto"`` every top-level folder is a class if there are at least two of them with images;
    images only in ``root`` itself, or only under one folder, are unlabelled; images both in ``root`` and in
    its folders are an error. ``True`` insists on classes (one will do), ``False`` takes all as unlabelled.

    Args:
        root: the folder.
        size: of the decoded short side, in pixels.
        crop: ``"center"`` gives ``(3, size, size)``, ``"random"`` leaves the long side uncut.
        background: what shows through transparent pixels: a colour's name, or red, green and blue up to 255.
        labels: whether top-level folders are classes.
        max_pixels: most pixels an image may have; one with more is broken.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such folder.
        ValueError: it has no images, its layout does not fit ``labels``, or an option is out of its range.
    """

    def __init__(
        self,
        *,
        root: str | os.PathLike[str],
        size: int = 64,
        crop: Crop = "center",
        background: str | Sequence[int] = "white",
        labels: bool | Literal["auto"] = "auto",
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        if not os.fspath(root):
            raise ValueError("data.root is empty: give the folder of your images")
        self.root = Path(root).expanduser().absolute()
        one_of("data.crop", crop, get_args(Crop))
        one_of("data.labels", labels, ("auto", True, False))
        self.options: dict[str, Any] = {
            "size": whole("data.image_size", size),
            "crop": crop,
            "background": colour("data.background", background),
            "max_pixels": whole("data.max_pixels", max_pixels),
        }
        if size * size > max_pixels:
            raise ValueError(f"data.image_size={size} makes pictures of more than data.max_pixels={max_pixels:,}")
        if not self.root.exists():
            there = next(folder for folder in self.root.parents if folder.exists())
            raise FileNotFoundError(
                f"data.root={printable(self.root)} does not exist; the way there ends at {printable(there)}"
            )
        if not self.root.is_dir():
            raise NotADirectoryError(f"data.root={printable(self.root)} is a file, not a folder of images")

        others: Counter[bytes] = Counter()
        found = sorted(_walk(os.fsencode(self.root), others))
        if not found:
            raise ValueError(_nothing(self.root, others))
        classes = self._classes([name for name, _ in found], labels)
        self.classes = tuple(printable(name) for name in classes)
        number = {name: k for k, name in enumerate(classes)}
        self._labels = np.array([number.get(_top(name), 0) for name, _ in found], dtype=np.int64)
        # a million names are one string and their ends
        self._names = b"".join(name for name, _ in found)
        self._ends = np.cumsum([0, *(len(name) for name, _ in found)])

        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr((DECODER, self.options, bool(classes))).encode())
        for name, status in found:
            digest.update(name + b"\0" + status)
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
        """The image, uint8 ``(3, h, w)``; raises ``Broken``."""
        return decode(self._path(index), **self.options)

    def content(self, index: int) -> bytes:
        """The bytes of the file; raises ``Broken``."""
        return read(self._path(index), most=16 * max(self.options["max_pixels"], MAX_PIXELS))

    def _path(self, index: int) -> str:
        return os.path.join(os.fspath(self.root), os.fsdecode(self._name(index)))

    def _name(self, index: int) -> bytes:
        index = range(len(self))[index]
        return self._names[self._ends[index] : self._ends[index + 1]]

    def _classes(self, names: list[bytes], labels: bool | str) -> list[bytes]:
        """The top-level folders in byte order; none when unlabelled."""
        tops = sorted({_top(name) for name in names} - {b""})
        loose = next((name for name in names if not _top(name)), None)
        if labels is False or (labels == "auto" and (not tops or (len(tops) == 1 and loose is None))):
            return []
        if loose is not None:
            raise ValueError(
                f"{printable(self.root)} (data.root) has images in the folder itself, such as "
                f"{printable(loose)}, and {len(tops)} folders of images: move those into folders of classes, "
                "or take all as unlabelled with data.labels=false"
            )
        return tops


def printable(name: bytes | os.PathLike[str]) -> str:
    """A file name as text that any terminal, JSON or table can take."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _top(name: bytes) -> bytes:
    """The top-level folder of a relative name, empty for a file of the root itself."""
    return name.rpartition(b"/")[0].partition(b"/")[0]


def _walk(root: bytes, others: Counter[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """Yield ``(relative name, what identifies the content)``; count the suffixes of other files.

    A pipe or a link to nowhere is listed too when it has the suffix of an image, so that it is reported as
    broken and not silently missing.
    """
    status = os.stat(root)
    waiting = [(root, b"", frozenset({(status.st_dev, status.st_ino)}))]
    while waiting:
        folder, prefix, above = waiting.pop()
        try:
            scan = os.scandir(folder)
        except PermissionError as error:  # a whole class silently missing would be worse than an end
            what = "data.root holds a folder that may not be read; change its permissions or move it away"
            raise PermissionError(error.errno, what, printable(folder)) from None
        with scan as entries:
            for entry in entries:
                if entry.name.startswith(b"."):
                    others[HIDDEN] += 1
                    continue
                suffix = os.path.splitext(entry.name)[1].lower()
                try:
                    status = entry.stat()
                except OSError:
                    if suffix in SUFFIXES:
                        yield prefix + entry.name, b""
                    continue
                if stat.S_ISDIR(status.st_mode):
                    here = (status.st_dev, status.st_ino)
                    if here not in above:  # a link to a folder that it is in would be endless
                        waiting.append((entry.path, prefix + entry.name + b"/", above | {here}))
                elif suffix in SUFFIXES:
                    times = status.st_mtime_ns, status.st_ctime_ns
                    yield prefix + entry.name, struct.pack("<2q2Q", *times, status.st_size, status.st_ino)
                else:
                    others[suffix] += 1


def _nothing(root: Path, others: Counter[bytes]) -> str:
    looked = " ".join(sorted(suffix.decode() for suffix in SUFFIXES))
    special = {b"": "without a suffix", HIDDEN: "hidden by a dot in front"}
    counts = [f"{count:,} {special.get(suffix) or printable(suffix)}" for suffix, count in others.most_common(8)]
    return (
        f"no images under {printable(root)} (data.root): looked for {looked} in it and its folders, "
        f"and found {', '.join(counts) if counts else 'no files at all'}"
    )
