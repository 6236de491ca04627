"""The check of the folders and archives that the user names."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sturdy.data.archive import SUFFIXES, Archive
from sturdy.data.archive_list import ArchiveError
from sturdy.data.files import Files
from sturdy.data.listing import ARCHIVE_SUFFIXES, MAX_KINDS, first_names, printable

TABLE_SUFFIXES = (".parquet", ".arrow")  # of what ``HuggingFace`` reads


def check_roots(root: Any) -> list[Path]:
    """Return the folders that ``root`` names, absolute; archives count as folders.

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
            if find_archive(inner) != find_archive(outer):
                continue  # the archives in a folder are not images of it
            if i != k and (inner.is_relative_to(outer) or folders[k].is_relative_to(folders[i])):
                relation = "the same folder as" if inner == outer else "inside"
                raise ValueError(
                    f"root={printable(folders[k])} is {relation} {printable(folders[i])}, and its "
                    f"images would count twice: give one of them"
                )
    return folders


def find_archive(path: Path) -> Path | None:
    """Return the archive that ``path`` is or leads into; ``None`` if it is a path on the disk."""
    for part in [path, *path.parents]:
        if os.fsencode(part.suffix.lower()) in SUFFIXES and part.is_file():
            return part
    return None


def open_archives(roots: Sequence[Path]) -> Files:
    """Return what reads the files under ``roots``.

    Raises:
        FileNotFoundError: an archive does not have the folder that a root names.
        ValueError: an archive is damaged.
        OSError: it cannot be read.
    """
    archives: dict[Path, Archive] = {}
    for root in roots:
        path = find_archive(root)
        if path is None:
            continue
        try:
            archive = archives.setdefault(path, archives.get(path) or Archive(os.fsencode(path)))
        except ArchiveError as error:
            raise ValueError(f"root={error}") from None
        if path != root and not archive.is_folder(os.fsencode(root.relative_to(path))):
            entries = sorted(archive.scan(b""))
            folders = [printable(entry.name) for entry in entries if archive.is_folder(entry.name)]
            raise FileNotFoundError(
                f"root={printable(root)} is no folder of the archive, which has: "
                f"{first_names(folders, MAX_KINDS) or 'none'}"
            )
    return Files(list(archives.values()))


def check_table_root(root: Any) -> Path:
    """Return the folder or the one file of tables that ``root`` names, absolute.

    Raises:
        ValueError: it is no name of a folder or of such a file here.
        OSError: it does not exist, or cannot be read.
    """
    if root is None:
        raise ValueError("root=null: give the folder of the data set, or a Parquet file")
    path = _check_name(root)
    return path if path.suffix in TABLE_SUFFIXES and path.is_file() else _check_folder(path)


def _check_root(root: Any) -> Path:
    path = _check_name(root)
    return path if find_archive(path) else _check_folder(path)


def _check_name(root: Any) -> Path:
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
    return path.resolve() if ".." in path.parts else path


def check_exists(path: Path) -> None:
    """Raise FileNotFoundError, with the nearest folder that exists, if ``path`` does not."""
    if not path.exists():
        existing = next(folder for folder in path.parents if folder.exists())
        raise FileNotFoundError(
            f"root={printable(path)} does not exist; the nearest folder that does is "
            f"{printable(existing)}"
        )


def _check_folder(path: Path) -> Path:
    try:
        check_exists(path)
        if not path.is_dir():
            is_archive = path.suffix.lower().encode() in ARCHIVE_SUFFIXES
            archive = "an archive that cannot be read in place: unpack it, or make a .zip or a .tar"
            kind = archive if is_archive else "a file, not a folder of images"
            if path.suffix in TABLE_SUFFIXES:
                kind += "; data=huggingface reads it"
            raise NotADirectoryError(f"root={printable(path)} is {kind}")
    except OSError as error:
        if error.errno is None:
            raise
        message = f"root={printable(path)} cannot be read ({error.strerror})"
        raise type(error)(error.errno, message) from None
    return path
