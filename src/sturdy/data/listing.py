"""What lies under a folder: the images, and what was left out, so that a user can be told.

name of an image = prefix + its path under the root
"""

import fnmatch
import os
import stat
import struct
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from sturdy.data.formats import INSTALL_HEIC, READS_HEIC, is_image

HEIC = frozenset({b".heic", b".heif", b".hif"})
SUFFIXES = frozenset(
    b".avif .bmp .gif .j2k .jfif .jp2 .jpe .jpeg .jpf .jpg .jpx .png .tif .tiff .webp".split()
) | (HEIC if READS_HEIC else frozenset())
TEXTS = frozenset(
    b".caption .csv .json .jsonl .parquet .tsv .txt .xml".split()
)  # captions, labels, tables
ARCHIVES = frozenset(b".7z .gz .rar .tar .tgz .zip".split())
# folders that systems make, in lower case; those with a dot in front are hidden anyway
SYSTEM = frozenset(
    name.encode()
    for name in (
        "#recycle",
        "#snapshot",
        "$recycle.bin",
        "@eadir",
        "@recently-snapshot",
        "@recycle",
        "__macosx",
        "__pycache__",
        "lost+found",
        "recycler",
        "system volume information",
    )
)


class Found(NamedTuple):
    """An image: its name, what identifies its content, and the two upper folders it is in, empty if
    there are none.
    """

    name: bytes
    status: bytes
    top: bytes
    second: bytes


class Listing:
    """The images under some folders at any depth, and how many other things there are; links are
    followed.

    Hidden files and folders, folders of the system and what ``exclude`` matches are left out.

    Args:
        exclude: glob patterns of paths under a root; ``*`` matches ``/`` too.
        any_suffix: read the first bytes of files with other suffixes, and take those that are
            images.
    """

    def __init__(self, exclude: Sequence[str] = (), *, any_suffix: bool = False) -> None:
        self.exclude = {pattern: os.fsencode(pattern.strip("/")) for pattern in exclude}
        self.any_suffix = any_suffix
        self.images: list[Found] = []
        self.tops: set[bytes] = set()  # with images or without
        self.suffixes: Counter[bytes] = Counter()  # of files left out
        self.examples: dict[bytes, list[bytes]] = {}  # the first paths of each of these suffixes
        self.hidden = 0
        self.system: Counter[bytes] = Counter()  # folders, by name
        self.excluded: Counter[str] = Counter()  # files and folders, by pattern

    def add(self, root: bytes, prefix: bytes = b"") -> None:
        """List what is under ``root``.

        A pipe or a link to nowhere is listed too when it has the suffix of an image, so that it is
        reported as broken and not silently missing.

        Raises:
            PermissionError: a folder may not be read; a class silently missing would be worse.
        """
        status = os.stat(root)
        waiting = [(root, b"", frozenset({(status.st_dev, status.st_ino)}))]
        while waiting:
            folder, inside, above = waiting.pop()
            top, second = [*inside.split(b"/")[:-1], b"", b""][:2]
            try:
                scan = os.scandir(folder)
            except PermissionError as error:
                way_out = (
                    f", or leave it out with data.exclude=[{printable(inside[:-1])}]"
                    if inside
                    else ""
                )
                message = f"data.root holds a folder that may not be read; change its permissions{way_out}"
                raise PermissionError(error.errno, message, printable(folder)) from None
            with scan as entries:
                for entry in entries:
                    path = inside + entry.name
                    if self._left_out(path, entry.name):
                        continue
                    try:
                        status = entry.stat()
                    except OSError:
                        if _suffix(entry.name) in SUFFIXES:
                            self.images.append(Found(prefix + path, b"", top, second))
                        continue
                    if not stat.S_ISDIR(status.st_mode):
                        if what := self._file(entry.path, status):
                            self.images.append(Found(prefix + path, what, top, second))
                    elif entry.name.lower() in SYSTEM:
                        self.system[entry.name] += 1
                    else:
                        if not inside:
                            self.tops.add(entry.name)
                        here = (status.st_dev, status.st_ino)
                        if here not in above:  # a link to a folder that it is in would be endless
                            waiting.append((entry.path, path + b"/", above | {here}))

    def _left_out(self, path: bytes, name: bytes) -> bool:
        if name.startswith(b"."):
            self.hidden += 1
            return True
        for pattern, raw in self.exclude.items():
            if fnmatch.fnmatchcase(path, raw):
                self.excluded[pattern] += 1
                return True
        return False

    def _file(self, path: bytes, status: os.stat_result) -> bytes:
        """What identifies the content of an image; empty, and counted, if the file is none."""
        suffix = _suffix(path)
        if suffix in SUFFIXES or (self.any_suffix and begins_as_image(path)):
            return struct.pack(
                "<2q2Q", status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino
            )
        self.suffixes[suffix] += 1
        examples = self.examples.setdefault(suffix, [])
        if len(examples) < 3:
            examples.append(path)
        return b""

    def left_out(self, *, texts: bool = False, most: int = 8) -> list[str]:
        """What was left out, how many of it and what would read it; ``texts`` counts captions and
        tables, too.
        """
        others = [(s, count) for s, count in _by_count(self.suffixes) if texts or s not in TEXTS]
        parts = [f"{count:,} {self._suffix_says(suffix)}" for suffix, count in others[:most]]
        if rest := sum(count for _, count in others[most:]):
            parts.append(f"{rest:,} other files")
        if self.hidden:
            parts.append(f"{self.hidden:,} hidden by a dot in front")
        for name, count in _by_count(self.system):
            parts.append(f"{count:,} {printable(name)} folder{'s' * (count > 1)}")
        for pattern, count in self.excluded.items():
            parts.append(f"{count:,} matched by data.exclude={pattern}")
        return parts

    def texts(self) -> list[str]:
        """Captions, labels and tables: by name where there are few of a kind, else how many."""
        parts = []
        for suffix, count in _by_count(self.suffixes):
            if suffix in TEXTS:
                few = count <= len(self.examples[suffix])
                names = sorted(printable(os.path.basename(path)) for path in self.examples[suffix])
                parts += names if few else [f"{count:,} {printable(suffix)}"]
        return parts

    def unmatched(self) -> list[str]:
        """Patterns of ``exclude`` that match nothing."""
        return [pattern for pattern in self.exclude if not self.excluded[pattern]]

    def _suffix_says(self, suffix: bytes) -> str:
        what = printable(suffix) or "without a suffix"
        if suffix in HEIC:
            return f"{what} ({INSTALL_HEIC} them)"
        if suffix in ARCHIVES:
            return f"{what} (unpack first)"
        if any(begins_as_image(path) for path in self.examples[suffix]):
            return f"{what} (data.any_suffix=true reads those that are images)"
        return what


def begins_as_image(path: bytes) -> bool:
    """Whether the first bytes of a regular file are those of an image that is read."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return False
        with open(path, "rb") as file:
            return is_image(file.read(64))
    except OSError:
        return False


def printable(name: bytes | os.PathLike[str]) -> str:
    """A file name as text that any terminal, JSON or table can take."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _by_count(counter: Counter[bytes]) -> list[tuple[bytes, int]]:
    """The most frequent first, then by name."""
    return sorted(counter.items(), key=lambda item: (-item[1], item[0]))


def _suffix(name: bytes) -> bytes:
    return os.path.splitext(name)[1].lower()
