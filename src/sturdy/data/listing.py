"""The files under a folder: which are images, which are texts about them, what was left out."""

import fnmatch
import os
import stat
import struct
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from sturdy.data import archive
from sturdy.data.files import Files
from sturdy.data.formats import HEAD, INSTALL_HEIC, READS_HEIC, is_image

HEIC = frozenset({b".heic", b".heif", b".hif"})
SUFFIXES = frozenset(
    b".avif .bmp .gif .j2k .jfif .jp2 .jpe .jpeg .jpf .jpg .jpx .png .tif .tiff .webp".split()
) | (HEIC if READS_HEIC else frozenset())
# of captions, labels and tables
TEXT_SUFFIXES = frozenset(b".caption .csv .json .jsonl .parquet .tsv .txt .xml".split())
TABLES = frozenset({b"metadata.csv", b"metadata.jsonl"})  # those that can be read
ARCHIVE_SUFFIXES = frozenset(b".7z .bz2 .gz .rar .tar .tbz2 .tgz .txz .xz .zip .zst".split())
# folders that systems make, in lower case; hidden ones begin with a dot and are left out anyway
SYSTEM_FOLDERS = frozenset(
    b"#recycle #snapshot $recycle.bin @eadir @recently-snapshot @recycle __macosx __pycache__ "
    b"lost+found recycler".split()
) | {b"system volume information"}

MAX_KINDS = 8  # most kinds of left out files that are named


class ImageFile(NamedTuple):
    """An image file.

    Attributes:
        name: its path under the folder that all roots are in.
        status: identifies its content: times, size and inode; empty if it cannot be read.
        top: the folder of its root that it is in; empty if it is in the root itself.
        second: the folder of ``top`` that it is in; empty if there is none.
    """

    name: bytes
    status: bytes
    top: bytes
    second: bytes


class TextFile(NamedTuple):
    """A file that may have captions or classes.

    Attributes:
        name: its path under the folder that all roots are in, as of an image.
        path: its path.
        files: reads it.
    """

    name: bytes
    path: bytes
    files: Files = Files()


class Listing:
    """The images under some folders at any depth, and the number of other files.

    Links are followed. Hidden files and folders, folders of the system, and what ``exclude``
    matches are left out.

    Args:
        files: reads the folders.
        exclude: glob patterns of paths under a root; ``*`` matches ``/`` too.
        any_suffix: whether to read the first bytes of files with other suffixes, and to take those
            that are images.
        keep_texts: whether to keep the paths of ``.txt`` files, which may be captions.

    Attributes:
        images: the images found so far.
        tops: the folders in the roots, with images or without.
        tables: the files named ``metadata.csv`` or ``metadata.jsonl``.
        text_files: the ``.txt`` files by their name without the suffix, with ``keep_texts``.
        used: the files that ``use`` was told of.
    """

    def __init__(
        self,
        files: Files,
        exclude: Sequence[str] = (),
        *,
        any_suffix: bool = False,
        keep_texts: bool = False,
    ) -> None:
        self.files = files
        self.exclude = {pattern: os.fsencode(pattern.strip("/")) for pattern in exclude}
        self.any_suffix = any_suffix
        self.images: list[ImageFile] = []
        self.tops: set[bytes] = set()
        self.keep_texts = keep_texts
        self.tables: list[TextFile] = []
        self.text_files: dict[bytes, TextFile] = {}
        self.used: set[TextFile] = set()
        self.other_files: Counter[bytes] = Counter()  # by suffix
        self.examples: dict[bytes, list[bytes]] = {}  # the first paths of each of these suffixes
        self.hidden = 0
        self.system_folders: Counter[bytes] = Counter()  # by name
        self.excluded: Counter[str] = Counter()  # files and folders, by pattern

    def add(self, root: bytes, prefix: bytes = b"") -> None:
        """List the files under ``root``; their names begin with ``prefix``.

        A pipe or a dangling link with the suffix of an image is listed too, so that it is reported
        as broken.

        Raises:
            PermissionError: a folder may not be read. To skip it could lose a class silently.
        """
        status = self.files.stat(root)
        waiting = [(root, b"", frozenset({(status.st_dev, status.st_ino)}))]
        while waiting:
            folder, inside, ancestors = waiting.pop()
            top, second = [*inside.split(b"/")[:-1], b"", b""][:2]
            for entry in self._scan(folder, inside):
                path = inside + entry.name
                if self._is_left_out(path, entry.name):
                    continue
                try:
                    status = entry.stat()
                except OSError:
                    if _suffix(entry.name) in SUFFIXES:
                        self.images.append(ImageFile(prefix + path, b"", top, second))
                    continue
                if not stat.S_ISDIR(status.st_mode):
                    if self._is_image(entry.path):
                        file = ImageFile(prefix + path, pack_status(status), top, second)
                        self.images.append(file)
                    elif stat.S_ISREG(status.st_mode):
                        self._keep_text(TextFile(prefix + path, entry.path, self.files))
                elif entry.name.lower() in SYSTEM_FOLDERS:
                    self.system_folders[entry.name] += 1
                else:
                    if not inside:
                        self.tops.add(entry.name)
                    here = (status.st_dev, status.st_ino)
                    if here not in ancestors:  # a link to a folder above would never end
                        waiting.append((entry.path, path + b"/", ancestors | {here}))

    def _scan(
        self, folder: bytes, inside: bytes
    ) -> Sequence[os.DirEntry[bytes] | archive.ArchiveEntry]:
        try:
            return self.files.scan(folder)
        except PermissionError as error:
            message = "root=... holds a folder that may not be read; change its permissions"
            if inside:
                message += f", or leave it out with exclude=[{printable(inside[:-1])}]"
            raise PermissionError(error.errno, message, printable(folder)) from None

    def _is_left_out(self, path: bytes, name: bytes) -> bool:
        if name.startswith(b"."):
            self.hidden += 1
            return True
        for pattern, raw in self.exclude.items():
            if fnmatch.fnmatchcase(path, raw):
                self.excluded[pattern] += 1
                return True
        return False

    def _keep_text(self, file: TextFile) -> None:
        stem, suffix = os.path.splitext(file.name)
        if os.path.basename(file.name) in TABLES:
            self.tables.append(file)
        elif self.keep_texts and suffix.lower() == b".txt":
            self.text_files[stem] = file

    def use(self, files: Iterable[TextFile]) -> None:
        """Count these files no longer among those that are not used."""
        new = set(files) - self.used
        self.used |= new
        for file in new:
            suffix = _suffix(file.name)
            self.other_files[suffix] -= 1
            self.examples[suffix] = [path for path in self.examples[suffix] if path != file.path]

    def _is_image(self, path: bytes) -> bool:
        """Return whether a file is listed as an image; count it otherwise."""
        suffix = _suffix(path)
        if suffix in SUFFIXES or (self.any_suffix and self._begins_as_image(path)):
            return True
        self.other_files[suffix] += 1
        examples = self.examples.setdefault(suffix, [])
        if len(examples) < 3:
            examples.append(path)
        return False

    def _begins_as_image(self, path: bytes) -> bool:
        """Return whether the first bytes of a regular file are those of an image that is read."""
        return is_image(self.files.read_head(path, HEAD))

    def left_out(self, *, texts: bool = False) -> list[str]:
        """Count what was left out, and say what would read it; captions and tables if ``texts``."""
        others = [
            (suffix, n)
            for suffix, n in _most_frequent(self.other_files)
            if texts or suffix not in TEXT_SUFFIXES
        ]
        parts = [f"{n:,} {self._describe_suffix(suffix)}" for suffix, n in others[:MAX_KINDS]]
        if rest := sum(n for _, n in others[MAX_KINDS:]):
            parts.append(f"{rest:,} other files")
        if self.hidden:
            parts.append(f"{self.hidden:,} hidden by a dot in front")
        for name, n in _most_frequent(self.system_folders):
            parts.append(f"{n:,} {printable(name)} folder{'s' * (n > 1)}")
        for pattern, n in self.excluded.items():
            parts.append(f"{n:,} matched by exclude={pattern}")
        return parts + self.files.left_out()

    def texts(self) -> list[str]:
        """Name the files of captions, labels and tables; count them where there are many."""
        parts = []
        for suffix, n in _most_frequent(self.other_files):
            examples = self.examples[suffix]
            if suffix not in TEXT_SUFFIXES or n == 0:
                continue
            if n <= len(examples):
                parts += sorted(printable(os.path.basename(path)) for path in examples)
            else:
                parts.append(f"{n:,} {printable(suffix)}")
        return parts

    def has_text_of_image(self) -> bool:
        """Return whether one of the first ``.txt`` files has the name of an image beside it."""
        stems = [os.path.splitext(path)[0] for path in self.examples.get(b".txt", [])]
        suffixes = [*SUFFIXES, *(suffix.upper() for suffix in SUFFIXES)]
        return any(self.files.exists(stem + suffix) for stem in stems for suffix in suffixes)

    def unmatched(self) -> list[str]:
        """Return the patterns of ``exclude`` that match nothing."""
        return [pattern for pattern in self.exclude if not self.excluded[pattern]]

    def _describe_suffix(self, suffix: bytes) -> str:
        text = printable(suffix) or "without a suffix"
        if suffix in HEIC:
            return f"{text} ({INSTALL_HEIC} them)"
        if suffix in archive.SUFFIXES and not self.files.archives:
            return f"{text} (root= reads archives)"
        if suffix in ARCHIVE_SUFFIXES:
            return f"{text} (unpack first)"
        if suffix in (b".arrow", b".parquet"):
            return f"{text} (data=huggingface reads them)"
        if any(self._begins_as_image(path) for path in self.examples[suffix]):
            return f"{text} (any_suffix=true reads those that are images)"
        return text


def pack_status(status: os.stat_result) -> bytes:
    """Return what identifies the content of a file: its times, size and inode."""
    times = (status.st_mtime_ns, status.st_ctime_ns)
    return struct.pack("<2q2Q", *times, status.st_size, status.st_ino)


def _suffix(name: bytes) -> bytes:
    return os.path.splitext(name)[1].lower()


def _most_frequent(counter: Counter[bytes]) -> list[tuple[bytes, int]]:
    """Return names and numbers, the largest number first, then by name."""
    return sorted(counter.items(), key=lambda item: (-item[1], item[0]))


def first_names(names: Collection[str], most: int = 3) -> str:
    """Return the first names, and dots if there are more."""
    return ", ".join([*names][:most]) + ", ..." * (len(names) > most)


def printable(name: bytes | os.PathLike[str]) -> str:
    """Return a file name as text that any terminal, JSON or table can hold."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
