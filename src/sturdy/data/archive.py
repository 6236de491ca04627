"""Zip and tar archives, read in place.

    cars.zip/cats/1.jpg     the path of the file cats/1.jpg in the archive cars.zip

The list of the files is read once. Each file is then read at its own offset, so that several
threads can read at once. Nothing is unpacked to the disk, and no name in an archive is ever a path
on the disk.
"""

import os
import stat
import struct
import weakref
import zlib
from collections import Counter
from typing import NamedTuple

from sturdy.data.archive_list import Entry, Member, read_entries
from sturdy.data.source import BadImageError, check_file_size

SUFFIXES = (b".zip", b".tar")
LOCAL_HEADER = 30  # bytes of the header before a file in a zip, without two texts
LENGTHS = 26  # where the lengths of these texts are in it
DAMAGED = "damaged in the archive"
LINKS = "links or devices in the archive"
OUTSIDE = "paths that lead out of the archive"
REPLACED = "replaced by a later file of the same name in the archive"
TOO_LONG = "names in the archive that are too long"
MAX_NAME = 4096  # bytes, as of a path on the disk


class ArchiveEntry(NamedTuple):
    """A file or a folder in an archive, as ``os.scandir`` describes those on the disk."""

    name: bytes
    path: bytes
    status: os.stat_result

    def stat(self) -> os.stat_result:
        """Return the status; the time is that of the archive."""
        return self.status


class Archive:
    """The folders and files in a zip or a tar.

    Of several files of one name, the last counts, as if they were unpacked.

    Args:
        path: of the archive; its suffix is ``.zip`` or ``.tar``.

    Attributes:
        path: the same.
        left_out: the number of entries that are not read, by the reason.

    Raises:
        ArchiveError: it is damaged, cut short, or of another format.
        OSError: it cannot be read.
    """

    def __init__(self, path: bytes) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)
        self._status = os.fstat(self._descriptor)
        self._is_zip = path.lower().endswith(b".zip")
        self.left_out: Counter[str] = Counter()
        # The entries of each folder by name; a folder in it is None.
        self._folders: dict[bytes, dict[bytes, Member | None]] = {b"": {}}
        for entry in read_entries(path):
            self._add(entry)

    def is_folder(self, name: bytes) -> bool:
        """Return whether the archive has this folder; ``b""`` is the archive itself."""
        return name in self._folders

    def exists(self, name: bytes) -> bool:
        """Return whether the archive has this file or folder."""
        return name in self._folders or self._find(name) is not None

    def stat(self, name: bytes) -> os.stat_result:
        """Return what stands for the status of a file or a folder.

        Its times are those of the archive, and its inode is the checksum or the offset.

        Raises:
            FileNotFoundError: there is no such file or folder.
        """
        member = self._find(name)
        if member is None and name not in self._folders:
            raise FileNotFoundError(f"{name!r} is not in {self.path!r}")
        return self._describe(name, member)

    def scan(self, folder: bytes) -> list[ArchiveEntry]:
        """Return the files and folders in ``folder``."""
        prefix = folder + b"/" if folder else b""
        path = self.path + b"/" + prefix
        return [
            ArchiveEntry(name, path + name, self._describe(prefix + name, member))
            for name, member in self._folders[folder].items()
        ]

    def read(self, name: bytes, limit: int) -> bytes:
        """Return the content of a file of at most ``limit`` bytes. Threads may call it at once.

        Raises:
            BadImageError: the file is missing, too large, damaged, or cannot be unpacked.
            OSError: the disk failed, or the archive has changed since it was opened.
        """
        member = self._find(name)
        if member is None:
            raise BadImageError("no such file")
        check_file_size(max(member.size, member.packed_size), limit)
        content = self._unpack(member, member.packed_size, member.size + 1)
        if len(content) != member.size:
            raise BadImageError(DAMAGED)
        if member.crc is not None and zlib.crc32(content) != member.crc:
            raise BadImageError(DAMAGED)
        return content

    def read_head(self, name: bytes, size: int) -> bytes:
        """Return the first ``size`` bytes of a file, unchecked; errors as of ``read``."""
        member = self._find(name)
        if member is None:
            raise BadImageError("no such file")
        return self._unpack(member, min(member.packed_size, size + 1024), size)

    def _add(self, entry: Entry) -> None:
        if len(entry.name) > MAX_NAME:
            self.left_out[TOO_LONG] += 1
            return
        parts = [part for part in entry.name.split(b"/") if part not in (b"", b".")]
        if entry.name.startswith(b"/") or b".." in parts:
            self.left_out[OUTSIDE] += 1
            return
        folder = b""
        for part in parts if entry.is_folder else parts[:-1]:
            self._folders[folder].setdefault(part, None)
            folder = folder + b"/" + part if folder else part
            self._folders.setdefault(folder, {})
        if entry.is_folder or not parts:
            return
        member = self._find(os.path.normpath(entry.target)) if entry.target else entry.member
        if member is None:
            self.left_out[LINKS] += 1
            return
        files = self._folders[folder]
        if files.get(parts[-1]) is not None:
            self.left_out[REPLACED] += 1
        files[parts[-1]] = member

    def _find(self, name: bytes) -> Member | None:
        folder, _, last = name.rpartition(b"/")
        return self._folders.get(folder, {}).get(last)

    def _describe(self, name: bytes, member: Member | None) -> os.stat_result:
        mode, inode, size = stat.S_IFDIR, len(name), 0  # another than those of the folders above
        if member is not None:
            mode, inode, size = stat.S_IFREG, member.offset, member.size
            if member.crc is not None:
                inode = member.crc
        times = {"st_mtime_ns": self._status.st_mtime_ns, "st_ctime_ns": self._status.st_ctime_ns}
        return os.stat_result((mode, inode, -1, 1, 0, 0, size, 0, 0, 0), times)

    def _unpack(self, member: Member, packed_size: int, most: int) -> bytes:
        """Return at most ``most`` bytes of a file, from ``packed_size`` bytes of the archive."""
        if member.problem:
            raise BadImageError(member.problem)
        status = os.fstat(self._descriptor)
        if (status.st_mtime_ns, status.st_size) != (self._status.st_mtime_ns, self._status.st_size):
            path = os.fsdecode(self.path)
            raise OSError(None, "the archive has changed since it was opened; start again", path)
        start = member.offset
        if self._is_zip:
            header = os.pread(self._descriptor, LOCAL_HEADER, start)
            if len(header) < LOCAL_HEADER or not header.startswith(b"PK\3\4"):
                raise BadImageError(DAMAGED)
            start += LOCAL_HEADER + sum(struct.unpack_from("<2H", header, LENGTHS))
        content = os.pread(self._descriptor, packed_size, start)
        if not member.is_deflated:
            return content[:most]
        try:
            return zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, most)
        except zlib.error:
            raise BadImageError(DAMAGED) from None
