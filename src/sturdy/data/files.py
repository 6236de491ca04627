"""Folders and files by their paths, on the disk or in archives.

photos/cats/1.jpg        cars.zip/cats/1.jpg
"""

import os
import stat
from collections.abc import Sequence

from sturdy.data.archive import Archive, ArchiveEntry
from sturdy.data.decode import read_file
from sturdy.data.source import BadImageError


class Files:
    """Reads folders and files; a path that goes on after that of an archive is in it.

    Args:
        archives: the archives that paths may lead into.
    """

    def __init__(self, archives: Sequence[Archive] = ()) -> None:
        self.archives = archives

    def stat(self, path: bytes) -> os.stat_result:
        """Return the status of a file or a folder; errors as of ``os.stat``."""
        archive, name = self._find(path)
        return archive.stat(name) if archive else os.stat(path)

    def scan(self, folder: bytes) -> Sequence[os.DirEntry[bytes] | ArchiveEntry]:
        """Return the files and folders in ``folder``; errors as of ``os.scandir``."""
        archive, name = self._find(folder)
        if archive:
            return archive.scan(name)
        with os.scandir(folder) as entries:
            return list(entries)

    def exists(self, path: bytes) -> bool:
        """Return whether there is such a file or folder."""
        archive, name = self._find(path)
        return archive.exists(name) if archive else os.path.exists(path)

    def is_folder(self, path: bytes) -> bool:
        """Return whether there is such a folder."""
        archive, name = self._find(path)
        return archive.is_folder(name) if archive else os.path.isdir(path)

    def read(self, path: bytes, limit: int) -> bytes:
        """Return the content of a regular file of at most ``limit`` bytes.

        Raises:
            BadImageError: the file is missing, too large, no regular file, or may not be read.
            OSError: the disk failed.
        """
        archive, name = self._find(path)
        return archive.read(name, limit) if archive else read_file(path, limit)

    def read_head(self, path: bytes, size: int) -> bytes:
        """Return the first ``size`` bytes of a regular file; none if it cannot be read."""
        archive, name = self._find(path)
        try:
            if archive:
                return archive.read_head(name, size)
            if not stat.S_ISREG(os.stat(path).st_mode):
                return b""
            with open(path, "rb") as file:
                return file.read(size)
        except (OSError, BadImageError):
            return b""

    def left_out(self) -> list[str]:
        """Say what the archives have that is not read."""
        return [
            f"{count:,} {reason}"
            for archive in self.archives
            for reason, count in archive.left_out.items()
        ]

    def _find(self, path: bytes) -> tuple[Archive | None, bytes]:
        """Return the archive that ``path`` leads into, and the name there."""
        for archive in self.archives:
            if path == archive.path:
                return archive, b""
            if path.startswith(archive.path + b"/"):
                return archive, path[len(archive.path) + 1 :]
        return None, path
