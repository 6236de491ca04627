"""Zip and tar archives, read in place: what is in them is what would be in the unpacked folder."""

import io
import multiprocessing
import os
import struct
import subprocess
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from image_files import content, only_the_cache
from test_split import draw

from sturdy.data.archive import MAX_NAME, Archive
from sturdy.data.archive_list import ArchiveError
from sturdy.data.cache import open_cache
from sturdy.data.folder import Folder
from sturdy.data.source import BadImageError

LIMIT = 10**6
fork = multiprocessing.get_context("fork")


@pytest.fixture
def photos(tmp_path):
    """Two classes at several depths, a table, captions, one broken image, and junk."""
    root = tmp_path / "photos"
    for k in range(12):
        draw(root / ("cat", "dog/é/deep")[k % 2] / f"{k:02d}.png", k)
    (root / "cat/00.txt").write_text("a cat,\nasleep")
    rows = [f"cat/{k:02d}.png,a cat {k},tabby" for k in range(2, 12, 2)]
    rows += [f"dog/é/deep/{k:02d}.png,a dog {k % 3},pug" for k in range(1, 12, 2)]
    rows += ["cat/00.png,,tabby", "cat/broken.png,broken,tabby", "no.png,nothing,pug"]
    (root / "metadata.csv").write_text("\n".join(["file_name,text,breed", *rows]))
    (root / "cat/broken.png").write_bytes((root / "cat/00.png").read_bytes()[:60])
    for name in (".DS_Store", "cat/._00.png", "__MACOSX/cat/1.png", "notes.md", "dog/more.zip"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"nothing")
    (root / "empty").mkdir()
    return root


def zipped(folder, compression=zipfile.ZIP_DEFLATED):
    path = folder.parent / f"{folder.name}-{compression}.zip"
    with zipfile.ZipFile(path, "w", compression) as archive:
        for file in sorted(folder.rglob("*"), reverse=True):
            archive.write(file, file.relative_to(folder))
    return path


def tarred(folder, format=tarfile.PAX_FORMAT):
    path = folder.parent / f"{folder.name}-{format}.tar"
    with tarfile.open(path, "w", format=format) as archive:
        archive.add(folder, arcname=".")
    return path


PACK = {
    "deflated zip": zipped,
    "stored zip": lambda folder: zipped(folder, zipfile.ZIP_STORED),
    "pax tar": tarred,
    "gnu tar": lambda folder: tarred(folder, tarfile.GNU_FORMAT),
    "ustar tar": lambda folder: tarred(folder, tarfile.USTAR_FORMAT),
}


def understood(folder, root):
    """All that a source says of its images, without its key."""
    images = []
    for k in range(len(folder)):
        try:
            pixels = folder.decode(k).tobytes()
        except BadImageError as error:
            pixels = str(error)
        caption = folder.caption(k) if folder.captions else None
        images.append((folder.name(k), folder.label(k), caption, folder.content(k), pixels))
    said = [line.replace(str(root), "ROOT") for line in folder.summary_lines()]
    return folder.classes, folder.captions, said, images


@pytest.mark.parametrize("kind", PACK)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"captions": True},
        {"label_column": "breed"},
        {"exclude": ["dog/*/deep", "*.md", "*.zip"], "labels": True, "crop": "random"},
        {"any_suffix": True, "labels": False},
    ],
    ids=lambda options: ",".join(options) or "plain",
)
def test_an_archive_is_its_unpacked_folder(photos, kind, options):
    archive = PACK[kind](photos)
    options = {"image_size": 8, **options}
    expected = understood(Folder(root=photos, **options), photos)
    found = understood(Folder(root=archive, **options), archive)
    # of a folder with an archive, the user is told that it may be a root itself
    expected[2][:] = [line.replace("root= reads archives", "unpack first") for line in expected[2]]
    assert found == expected
    assert len(expected[3]) >= 7


def test_the_cache_has_the_same_digests(photos, tmp_path):
    folder = Folder(root=photos, image_size=8)
    cache = open_cache(folder, root=tmp_path / "cache", max_broken=1)
    for pack in (zipped, tarred):
        source = Folder(root=pack(photos), image_size=8)
        other = open_cache(source, root=tmp_path / "cache", max_broken=1)
        assert other.path != cache.path
        assert other.digest_with_contents == cache.digest_with_contents
        assert (other.names, other.quarantine) == (cache.names, cache.quarantine)


@pytest.mark.parametrize("pack", [zipped, tarred])
def test_a_folder_of_an_archive(photos, pack):
    archive = pack(photos)
    inside = Folder(root=archive / "dog", image_size=8)
    unpacked = Folder(root=photos / "dog", image_size=8)
    assert understood(inside, archive)[3] == understood(unpacked, photos)[3]
    with pytest.raises(FileNotFoundError, match=r"cow is no folder of the archive, .* cat, dog,"):
        Folder(root=archive / "cow")
    with pytest.raises(FileNotFoundError, match=r"notes.md is no folder of the archive"):
        Folder(root=archive / "notes.md")


def test_parts_of_a_data_set_are_asked_about(tmp_path):
    for k in range(8):
        draw(tmp_path / "set" / ("train", "test")[k % 2] / "ab"[k // 4] / f"{k}.png", k)
    archive = zipped(tmp_path / "set")
    with pytest.raises(ValueError, match=r"may be parts") as error:
        Folder(root=archive)
    assert f"root={archive}/train " in str(error.value)
    assert Folder(root=archive / "train").classes == ("a", "b")
    both = Folder(root=[archive / "train", archive / "test"])
    assert (len(both), both.classes) == (8, ("a", "b"))


def test_folders_and_archives_together(photos, tmp_path):
    for k in range(20, 24):
        draw(tmp_path / "more" / "cat" / f"{k}.png", k)
    roots = [photos, tarred(tmp_path / "more")]
    both = Folder(root=roots, image_size=8)
    assert len(both) == 13 + 4
    assert both.classes == ("cat", "dog")
    names = [both.name(k) for k in range(len(both))]
    assert names[:2] == ["more-2.tar/cat/20.png", "more-2.tar/cat/21.png"]
    # an archive in a folder is no image of it, and may be another root
    inside = photos / "dog" / "more.tar"
    os.rename(roots[1], inside)
    assert len(Folder(root=[photos, inside], image_size=8)) == 17
    with pytest.raises(ValueError, match="would count twice"):
        Folder(root=[inside, inside / "cat"])


def test_threads_read_at_once(photos, tmp_path):
    for pack in PACK.values():
        archive = Archive(os.fsencode(pack(photos)))
        files = [f for f in photos.rglob("*") if f.is_file()] * 40
        names = [os.fsencode(f.relative_to(photos)) for f in files]
        with ThreadPoolExecutor(8) as pool:
            read = list(pool.map(lambda name, a=archive: a.read(name, LIMIT), names))
        assert read == [file.read_bytes() for file in files]


def test_what_other_programs_write(photos, tmp_path):
    archive = tmp_path / "other.tar"
    done = subprocess.run(["tar", "-cf", archive, "-C", photos, "."], check=False)
    if done.returncode:
        pytest.skip("no tar here")
    assert len(Folder(root=archive)) == len(Folder(root=photos))
    big = zipfile.ZipInfo("cat/1.png")
    with (
        zipfile.ZipFile(tmp_path / "64.zip", "w") as file,
        file.open(big, "w", force_zip64=True) as f,
    ):
        f.write(b"64 bits")
    assert Archive(bytes(tmp_path / "64.zip")).read(b"cat/1.png", LIMIT) == b"64 bits"
    with (tmp_path / "more.zip").open("wb") as file:  # as programs that unpack themselves
        file.write(b"#!/bin/sh\nexit\n")
        with zipfile.ZipFile(file, "a") as inner:
            inner.writestr("a", b"after a script")
    assert Archive(bytes(tmp_path / "more.zip")).read(b"a", LIMIT) == b"after a script"


def test_names_in_other_encodings(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("é.png", "o.png"):
            archive.writestr(name, b"")
    marked = (tmp_path / "a.zip").read_bytes()
    unmarked = bytearray(marked)
    for header, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):  # as macOS writes them
        unmarked[marked.index(header) + flags + 1] &= ~8
    assert bytes(unmarked) != marked
    latin = bytes(unmarked).replace("é".encode(), b"\x82x")  # code page 437, as of DOS
    for k, data in enumerate((marked, unmarked, latin)):
        (tmp_path / f"{k}.zip").write_bytes(data)
    names = [
        sorted(e.name.decode() for e in Archive(bytes(tmp_path / f"{k}.zip")).scan(b""))
        for k in range(3)
    ]
    assert names == [["o.png", "é.png"], ["o.png", "é.png"], ["o.png", "éx.png"]]
    with tarfile.open(tmp_path / "raw.tar", "w", errors="surrogateescape") as archive:
        archive.addfile(tarfile.TarInfo("caf\udce9.png"))
    assert [e.name for e in Archive(bytes(tmp_path / "raw.tar")).scan(b"")] == [b"caf\xe9.png"]


# --- archives that are not what they should be


def tar_of(path, *members):
    """Write a tar of ``(name, type, content or target)``."""
    with tarfile.open(path, "w") as archive:
        for name, kind, what in members:
            info = tarfile.TarInfo(name)
            info.type = kind
            if kind == tarfile.REGTYPE:
                info.size = len(what)
                archive.addfile(info, io.BytesIO(what))
            else:
                info.linkname = what
                archive.addfile(info)
    return path


def test_what_is_not_read_is_told(tmp_path):
    picture = tmp_path / "1.png"
    draw(picture, 1)
    data = picture.read_bytes()
    draw(picture, 2)
    file, link, hard = tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE
    archive = tar_of(
        tmp_path / "odd.tar",
        ("../up.png", file, data),
        ("/etc/root.png", file, data),
        ("a/../../b.png", file, data),
        ("x" * (MAX_NAME + 1) + ".png", file, data),
        ("link.png", link, "/etc/passwd"),
        ("pipe.png", tarfile.FIFOTYPE, ""),
        ("./twice.png", file, data),
        ("twice.png", file, picture.read_bytes()),
        ("same.png", hard, "./twice.png"),
        ("lost.png", hard, "nowhere.png"),
    )
    folder = Folder(root=archive, image_size=8)
    assert [folder.name(k) for k in range(len(folder))] == ["same.png", "twice.png"]
    assert folder.content(0) == folder.content(1) == picture.read_bytes()  # as if unpacked
    assert folder.summary_lines()[1] == (
        "left out: 3 paths that lead out of the archive, 1 names in the archive that are too long, "
        "3 links or devices in the archive, 1 replaced by a later file of the same name in the "
        "archive"
    )
    with zipfile.ZipFile(tmp_path / "odd.zip", "w") as file:
        file.writestr("../up.png", data)
        file.writestr("1.png", data)
        info = zipfile.ZipInfo("link.png")
        info.external_attr = 0o120777 << 16
        file.writestr(info, "/etc/passwd")
    folder = Folder(root=tmp_path / "odd.zip")
    assert len(folder) == 1
    assert folder.summary_lines()[1] == (
        "left out: 1 paths that lead out of the archive, 1 links or devices in the archive"
    )
    assert not (tmp_path.parent / "up.png").exists()


def patched(path, place, value):
    """Write ``value`` at ``place`` of the central directory's first entry."""
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\1\2") + place
    data[at : at + len(value)] = value
    path.write_bytes(data)
    return Archive(bytes(path))


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        (8, b"\x01\x00", "encrypted in the archive"),
        (10, b"\x0e\x00", "compressed by lzma in the archive, and only deflate is read"),
        (16, b"\x00\x00\x00\x00", "damaged in the archive"),  # the checksum
        (20, struct.pack("<I", 2**31), "2,147 MB is over the limit"),  # the packed size
        (24, struct.pack("<I", 2**31), "2,147 MB is over the limit"),  # the size
        (24, struct.pack("<I", 50_000), "damaged in the archive"),  # less than there is
        (24, struct.pack("<I", 200_000), "damaged in the archive"),  # more than there is
        (42, struct.pack("<I", 3), "damaged in the archive"),  # the offset
    ],
)
def test_a_file_of_a_zip_that_cannot_be_read(tmp_path, place, value, reason):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("1.png", bytes(100_000))
        archive.writestr("2.png", b"whole")
    assert Archive(bytes(path)).read(b"1.png", LIMIT) == bytes(100_000)
    broken = patched(path, place, value)
    with pytest.raises(BadImageError, match=reason):
        broken.read(b"1.png", LIMIT)
    assert broken.read(b"2.png", LIMIT) == b"whole"
    with pytest.raises(BadImageError, match="no such file"):
        broken.read(b"3.png", LIMIT)


def test_damaged_bytes_are_noticed(photos):
    path = zipped(photos)
    data = bytearray(path.read_bytes())
    first = zipfile.ZipFile(path).getinfo("cat/02.png")
    data[first.header_offset + 60] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadImageError, match="damaged in the archive"):
        Archive(bytes(path)).read(b"cat/02.png", LIMIT)


@pytest.mark.parametrize("cut", ["in the list", "in a file", "between files", "at the start"])
@pytest.mark.parametrize("pack", [zipped, tarred])
def test_an_archive_that_is_cut_short_is_refused(photos, pack, cut):
    path = pack(photos)
    data = path.read_bytes()
    with tarfile.open(tarred(photos)) as tar:
        last = tar.getmembers()[-1]
        between = last.offset if path.suffix == ".tar" else 0
    end = {
        "in the list": len(data) - 30 if path.suffix == ".zip" else between + 100,
        "in a file": len(data) // 2 + 1,
        "between files": between,
        "at the start": 100,
    }[cut]
    path.write_bytes(data[:end])
    with pytest.raises(ValueError, match=r"root=.* is no whole (zip|tar) archive .* copy or down"):
        Folder(root=path)


def test_a_damaged_list_of_a_tar_is_refused(photos):
    path = tarred(photos)
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        middle = archive.getmembers()[7].offset
    data[middle + 150] ^= 1  # in the checksum of a header: tarfile takes it for the end
    path.write_bytes(data)
    with tarfile.open(path) as archive:
        assert len(archive.getmembers()) < 9
    with pytest.raises(ArchiveError, match="no end after"):
        Archive(bytes(path))


@pytest.mark.parametrize("suffix", ["gz", "xz", "bz2"])
def test_a_compressed_tar_is_refused_with_the_way(photos, tmp_path, suffix):
    for name in (f"a.tar.{suffix}", "b.tar"):  # the second hides it
        with tarfile.open(tmp_path / name, f"w:{suffix}") as archive:
            archive.add(photos, arcname="")
    with pytest.raises(NotADirectoryError, match=r"unpack it, or make a \.zip or a \.tar"):
        Folder(root=tmp_path / f"a.tar.{suffix}")
    with pytest.raises(ValueError, match=r"b\.tar is compressed, .* decompress it to a plain"):
        Folder(root=tmp_path / "b.tar")


def test_a_negative_size_ends(tmp_path):
    path = tar_of(tmp_path / "a.tar", ("1.png", tarfile.REGTYPE, b"1"))
    data = bytearray(path.read_bytes())
    data[124:136] = (-1024 & (2**96 - 1)).to_bytes(12)  # of the size, in base 256
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    path.write_bytes(data)
    with pytest.raises(ArchiveError):
        Archive(bytes(path))


def test_an_archive_that_changes(photos):
    for pack in (zipped, tarred):
        path = pack(photos)
        before = Folder(root=path, image_size=8)
        status = path.stat()
        path.write_bytes(path.read_bytes() + bytes(512))
        with pytest.raises(OSError, match="has changed since it was opened"):
            before.decode(0)
        path.write_bytes(path.read_bytes()[:-512])
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        before.decode(0)
        assert Folder(root=path, image_size=8).key != before.key  # it was written since
        replaced = path.with_suffix(".new")
        replaced.write_bytes(b"another")
        os.replace(replaced, path)
        before.decode(1)  # still reads the archive that it opened


def test_killed_while_the_cache_is_built_from_a_zip(tmp_path):
    for k in range(300):
        draw(tmp_path / "many" / f"{k:03d}.png", k)
    source = Folder(root=zipped(tmp_path / "many"), image_size=64)
    root = tmp_path / "cache"
    child = fork.Process(target=open_cache, args=(source,), kwargs={"root": root, "workers": 2})
    child.start()
    while child.is_alive() and not [f for f in root.glob("*.building/*") if f.stat().st_size]:
        pass
    child.kill()
    child.join()
    assert not only_the_cache(root)
    again = open_cache(source, root=root)
    assert only_the_cache(root)
    unpacked = open_cache(Folder(root=tmp_path / "many", image_size=64), root=tmp_path / "whole")
    assert content(again) == content(unpacked)
    assert np.array_equal(again.contents, unpacked.contents)
