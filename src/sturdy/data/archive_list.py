"""The list of the files in a zip or tar archive, and where each begins."""

import os
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

ENCRYPTED, UTF8_NAME = 0x1, 0x800  # flags of a file in a zip
METHODS = {9: "deflate64", 12: "bzip2", 14: "lzma", 93: "zstandard", 95: "xz"}  # of a zip
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # first bytes of such a tar


class ArchiveError(ValueError):
    """An archive cannot be read; the message says why and what to do."""


class Member(NamedTuple):
    """A file in an archive.

    Attributes:
        offset: where its content begins; in a zip, the header before it.
        size: of the file, in bytes.
        packed_size: in the archive, in bytes.
        crc: of the content; ``None`` in a tar, which has none.
        is_deflated: whether it is compressed.
        problem: why it cannot be read; empty if it can.
    """

    offset: int
    size: int
    packed_size: int
    crc: int | None = None
    is_deflated: bool = False
    problem: str = ""


class Entry(NamedTuple):
    """A line in the list of an archive: a file, a folder, or something else.

    Attributes:
        name: its path, as it is written there.
        member: the file; ``None`` if it is none.
        is_folder: whether it is a folder.
        target: the name of the earlier file that this is a hard link to.
    """

    name: bytes
    member: Member | None = None
    is_folder: bool = False
    target: bytes = b""


def read_entries(path: bytes) -> Iterator[Entry]:
    """Yield the entries of an archive in their order.

    Raises:
        ArchiveError: it is damaged, cut short, or of another format.
        OSError: it cannot be read.
    """
    kind = "zip" if path.lower().endswith(b".zip") else "tar"
    try:
        yield from _read_zip(path) if kind == "zip" else _read_tar(path)
    except (OSError, MemoryError, ArchiveError):
        raise
    except Exception as error:  # both modules raise many types on damaged archives
        reason = " ".join(str(error).split())[:80] or type(error).__name__
        name = path.decode("utf-8", "backslashreplace")
        raise ArchiveError(
            f"{name} is no whole {kind} archive ({reason}): it may be cut short or damaged; "
            f"copy or download it again"
        ) from None


def _read_zip(path: bytes) -> Iterator[Entry]:
    with zipfile.ZipFile(os.fsdecode(path)) as archive:
        for info in archive.infolist():
            name = _zip_name(info)
            if info.is_dir():
                yield Entry(name, is_folder=True)
            elif stat.S_ISLNK(info.external_attr >> 16):
                yield Entry(name)
            else:
                yield Entry(name, _zip_member(info))


def _zip_name(info: zipfile.ZipInfo) -> bytes:
    """Return the name in UTF-8, also where it is not marked as such; others are in code page 437.

    Names of Windows may have backslashes.
    """
    name = info.filename.encode("utf-8", "surrogateescape")
    if not info.flag_bits & UTF8_NAME:
        with suppress(UnicodeError):
            name = info.filename.encode("cp437").decode().encode()
    return name.replace(b"\\", b"/") if info.create_system == 0 else name


def _zip_member(info: zipfile.ZipInfo) -> Member:
    problem = ""
    if info.flag_bits & ENCRYPTED:
        problem = "encrypted in the archive"
    elif info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        method = METHODS.get(info.compress_type, f"method {info.compress_type}")
        problem = f"compressed by {method} in the archive, and only deflate is read"
    return Member(
        info.header_offset,
        info.file_size,
        info.compress_size,
        info.CRC,
        info.compress_type == zipfile.ZIP_DEFLATED,
        problem,
    )


def _read_tar(path: bytes) -> Iterator[Entry]:
    with open(path, "rb") as file:
        if file.read(6).startswith(COMPRESSED):
            name = path.decode("utf-8", "backslashreplace")
            raise ArchiveError(
                f"{name} is compressed, and cannot be read in place: decompress it to a plain .tar"
            )
        file.seek(0)
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while (info := archive.next()) is not None:
                if info.size < 0:  # would be read again and again
                    raise ArchiveError(f"{os.fsdecode(path)} has a file of a negative size")
                yield _tar_entry(info)
                archive.members = []  # type: ignore[attr-defined]  # a million would fill the memory
            end = archive.offset
        # ``tarfile`` also stops at a damaged header, and where the file ends.
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"no end after {end:,} bytes")


def _tar_entry(info: tarfile.TarInfo) -> Entry:
    name = os.fsencode(info.name)
    if info.isdir():
        return Entry(name, is_folder=True)
    if info.islnk():
        return Entry(name, target=os.fsencode(info.linkname))
    if not info.isfile():
        return Entry(name)
    problem = "stored with holes in the archive, which is not read" if info.issparse() else ""
    return Entry(name, Member(info.offset_data, info.size, info.size, problem=problem))
