"""What a folder is taken for, what is left out of it, and what the user is asked about, in
words.
"""

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runs import COMMON, train
from sturdy.data.cache import open_cache
from sturdy.data.cache_writer import seal
from sturdy.data.classes import as_override, describe_classes
from sturdy.data.datamodule import folder_data
from sturdy.data.folder import Folder

NOISE = np.random.default_rng(0).integers(0, 256, (400, 6, 6, 3), dtype=np.uint8)
SMALL_DIT = ["backbone=dit", "backbone.width=32", "backbone.depth=1", "backbone.heads=2"]


def put(folder, n, start=0, suffix="png", size=16):
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(start, start + n):
        Image.fromarray(NOISE[k]).resize((size, size), Image.Resampling.BICUBIC).save(
            folder / f"{k:03d}.{suffix}"
        )


def put_bytes(path, content=b"nothing"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def refusal(**options):
    with pytest.raises(ValueError, match=r"\w+=") as error:
        Folder(**options)
    return str(error.value)


# --- classes


def test_classes_are_named_and_counted(tmp_path):
    put(tmp_path / "cat", 3)
    put(tmp_path / "dog", 2)
    (tmp_path / "van").mkdir()
    assert Folder(root=tmp_path).summary_lines() == [
        f"{tmp_path}: 5 images, classes: cat 3, dog 2",
        "left out: the folder van (no images)",
    ]
    assert Folder(root=tmp_path, labels=False).summary_lines() == [
        f"{tmp_path}: 5 images, no classes"
    ]


def test_of_many_classes_the_smallest_and_the_largest():
    said = describe_classes(Counter({f"{k:02d}".encode(): 5 + k % 7 for k in range(40)}))
    assert said.startswith("40 classes of 5 (")
    assert "to 11 (06) images: 00 5, 01 6" in said
    assert said.endswith("09 7, ...")


def test_one_folder_of_folders_is_pointed_out(tmp_path):
    put(tmp_path / "photos/cat", 3)
    put(tmp_path / "photos/dog", 2)
    (line,) = Folder(root=tmp_path).summary_lines()
    assert line == f"{tmp_path}: 5 images, no classes; root={tmp_path}/photos would make 2 classes"
    assert Folder(root=tmp_path / "photos").classes == ("cat", "dog")


# --- left out


def test_what_is_left_out_is_counted(tmp_path, monkeypatch):
    put(tmp_path, 4)
    for k in range(6):
        put_bytes(tmp_path / f"IMG_{k}.HEIC")
    for k in range(5):
        put_bytes(tmp_path / f"{k:032x}", (tmp_path / "000.png").read_bytes())
    for name in (
        "a.npy",
        "b.tar",
        ".DS_Store",
        "._000.png",
        "sub/.hidden/1.png",
        "README",
        "metadata.jsonl",
    ):
        put_bytes(tmp_path / name)
    for k in range(4):
        put_bytes(tmp_path / f"{k:03d}.txt")
    monkeypatch.setattr(
        "sturdy.data.listing.SUFFIXES", frozenset({b".png"})
    )  # whatever is installed here
    first, left_out, unused = Folder(root=tmp_path).summary_lines()
    assert first == f"{tmp_path}: 4 images, no classes"
    assert set(left_out.removeprefix("left out: ").split(", ")) == {
        "6 .heic (pip install 'sturdy-diffusion[heic]' reads them)",
        "6 without a suffix (any_suffix=true reads those that are images)",
        "1 .npy",
        "1 .tar (root= reads archives)",
        "3 hidden by a dot in front",
    }
    assert unused == (
        "not used, as only folders give classes: 4 .txt, metadata.jsonl; captions=true reads "
        "captions for a text condition from metadata.jsonl and the .txt of each image"
    )


def test_any_suffix_looks_at_the_content(tmp_path):
    put(tmp_path, 2)
    image = (tmp_path / "000.png").read_bytes()
    for name in ("hashed", "photo.jpg_large", "notes.txt"):
        put_bytes(tmp_path / name, b"plain words" if name.endswith("txt") else image)
    os.mkfifo(tmp_path / "pipe")
    folder = Folder(root=tmp_path, any_suffix=True)
    assert [folder.name(i) for i in range(len(folder))] == [
        "000.png",
        "001.png",
        "hashed",
        "photo.jpg_large",
    ]
    assert all(folder.decode(i).shape == (3, 64, 64) for i in range(4))
    assert len(Folder(root=tmp_path)) == 2


SYSTEM = [
    "@eaDir",
    "__MACOSX",
    "lost+found",
    "#recycle",
    "$RECYCLE.BIN",
    "System Volume Information",
    ".thumbnails",
]


@pytest.mark.parametrize("name", SYSTEM)
def test_folders_of_the_system_are_no_classes(tmp_path, name):
    put(tmp_path / "cat", 3)
    put(tmp_path / "dog", 2)
    key = Folder(root=tmp_path).key
    put(tmp_path / name / "1.jpg", 2)
    put(tmp_path / "dog" / name, 1)
    folder = Folder(root=tmp_path)
    assert (folder.classes, len(folder), folder.key) == (("cat", "dog"), 5, key)
    hidden = name.startswith(".")
    assert folder.summary_lines()[1:] == [
        f"left out: 2 {'hidden by a dot in front' if hidden else f'{name} folders'}"
    ]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_lost_and_found_need_not_be_readable(tmp_path):
    put(tmp_path, 2)
    (tmp_path / "lost+found").mkdir(mode=0)
    assert len(Folder(root=tmp_path)) == 2


def test_exclude(tmp_path):
    put(tmp_path / "cat", 3)
    put(tmp_path / "dog/old", 2)
    put(tmp_path / "dog", 2, start=3, suffix="gif")
    put(tmp_path / "thumbs", 1)
    folder = Folder(root=tmp_path, exclude=["thumbs/", "*/old", "*_none*"])
    assert [folder.name(i) for i in range(len(folder))] == [
        f"cat/{k:03d}.png" for k in range(3)
    ] + [
        "dog/003.gif",
        "dog/004.gif",
    ]
    assert folder.summary_lines()[1:] == [
        "left out: 1 matched by exclude=thumbs/, 1 matched by exclude=*/old",
        "exclude=[*_none*] matches nothing",
    ]
    assert Folder(root=tmp_path, exclude="*.gif").classes == ("cat", "dog", "thumbs")
    for wrong in (3, [3], [""]):
        assert "exclude=" in refusal(root=tmp_path, exclude=wrong)


# --- folders that may be no classes


def test_splits_are_asked_about_and_every_word_of_the_answer_works(tmp_path):
    for split, n in (("Train", 6), ("test", 2)):
        for k, name in enumerate(("cat", "dog", "bird")):
            put(tmp_path / split / name, n, start=100 * k + 10 * n)
    said = refusal(root=tmp_path).splitlines()
    assert said[0].startswith(f"root={tmp_path} has folders that may be parts of a data set")
    assert [line.split("  ")[1] for line in said[1:]] == [
        f"root={tmp_path}/Train",
        f"root=[{tmp_path}/Train,{tmp_path}/test]",
        "labels=true",
        "labels=false",
    ]
    promised = [line.split("  ")[-1].strip() for line in said[1:]]
    answers = [
        {"root": str(tmp_path / "Train")},
        {"root": [str(tmp_path / "Train"), str(tmp_path / "test")]},
        {"root": tmp_path, "labels": True},
        {"root": tmp_path, "labels": False},
    ]
    for answer, promise in zip(answers, promised, strict=True):
        assert Folder(**answer).summary_lines()[0].endswith(f": {promise}")
    assert promised[1] == "24 images, classes: bird 8, cat 8, dog 8"


@pytest.mark.parametrize(
    ("layout", "first"),
    [
        (["train/cat", "train/dog"], "/train "),
        (["training", "validation"], "/training "),
        (["cat", "dog", "test"], "/test "),
        (["train/cat", "test/cat"], "/train "),
        (["images", "masks"], "/images "),
        (["JPEGImages", "SegmentationClass"], "/JPEGImages "),
        (["conditioning", "photos"], "labels=true "),
    ],
)
def test_what_is_asked_about(tmp_path, layout, first):
    for k, name in enumerate(layout):
        put(tmp_path / name, 2, start=10 * k)
    said = refusal(root=tmp_path).splitlines()
    assert first in said[1]
    promised = {line.split("  ")[1]: line.split("  ")[-1].strip() for line in said[1:]}
    for word in promised:
        if word.startswith("root=/"):
            assert (
                Folder(root=word.removeprefix("root="))
                .summary_lines()[0]
                .endswith(f": {promised[word]}")
            )
    assert Folder(root=tmp_path, labels=True).classes == tuple(
        sorted({name.split("/")[0] for name in layout})
    )
    assert Folder(root=tmp_path, labels=False).classes == ()


@pytest.mark.parametrize(
    "layout", [["train"], ["images"], ["images/2024"], ["trainers", "tests"], ["car", "labelled"]]
)
def test_what_is_not_asked_about(tmp_path, layout):
    for k, name in enumerate(layout):
        put(tmp_path / name, 2, start=10 * k)
    assert len(Folder(root=tmp_path)) == 2 * len(layout)


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("/data/train", "root=/data/train"),
        ("/my data/zoë (1)", """'root="/my data/zoë (1)"'"""),
        ('/a"b', """'root="/a\\"b"'"""),
    ],
)
def test_words_can_be_typed(path, word):
    assert as_override("root", [Path(path)]) == word


# --- several roots


def test_several_roots_unite_classes_by_name(tmp_path):
    put(tmp_path / "a/cat", 2)
    put(tmp_path / "a/dog", 1, start=10)
    put(tmp_path / "b/deep/cat", 1, start=20)
    put(tmp_path / "b/deep/bird", 1, start=30)
    folder = Folder(root=[tmp_path / "a", tmp_path / "b/deep"], image_size=16)
    assert folder.classes == ("bird", "cat", "dog")
    found = {folder.name(i): folder.classes[folder.label(i)] for i in range(len(folder))}
    assert found == {
        "a/cat/000.png": "cat",
        "a/cat/001.png": "cat",
        "a/dog/010.png": "dog",
        "b/deep/bird/030.png": "bird",
        "b/deep/cat/020.png": "cat",
    }
    assert all(folder.decode(i).shape == (3, 16, 16) for i in range(5))
    again = Folder(root=[tmp_path / "b/deep", tmp_path / "a"], image_size=16)
    assert again.key == folder.key  # the order of the roots means nothing
    insisted = Folder(root=tmp_path, image_size=16, labels=True)  # the same names with other labels
    assert insisted.classes == ("a", "b")
    assert insisted.key != folder.key
    assert (
        Folder(root=[tmp_path / "a"], image_size=16).key
        == Folder(root=tmp_path / "a", image_size=16).key
    )


def test_roots_that_overlap_are_refused(tmp_path):
    put(tmp_path / "a/cat", 2)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for roots in (["a", "a/cat"], ["a", "a"], ["a", "link"], ["link/cat", "a"]):
        said = refusal(root=[tmp_path / name for name in roots])
        assert "would count twice" in said


@pytest.mark.parametrize(
    ("root", "message"),
    [
        (
            "s3://bucket/photos",
            "root=s3://bucket/photos is not on this machine: download it, or mount it",
        ),
        ([], "is empty: give the folder"),
        (None, "root=None is not the name of a folder"),
        (True, "root=True is not the name of a folder"),
        (7, "root=7 is not the name of a folder here; quote a name"),
        ("x" * 300, " cannot be read (File name too long)"),
        ("photos.zip", "photos.zip is no whole zip archive (File is not a zip file): it may be"),
        ("photos.tgz", "photos.tgz is an archive that cannot be read in place: unpack it, or"),
    ],
)
def test_roots_that_are_no_folders(tmp_path, monkeypatch, root, message):
    monkeypatch.chdir(tmp_path)
    put_bytes(tmp_path / "photos.zip")
    put_bytes(tmp_path / "photos.tgz")
    with pytest.raises((ValueError, OSError), match="root=") as error:
        Folder(root=root)
    assert message in str(error.value)


def test_a_number_may_be_the_name_of_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "2024", 2)
    assert len(Folder(root=2024)) == 2


# --- images that are odd


def remarks(tmp_path, **options):
    folder = Folder(root=tmp_path / "photos", **{"image_size": 16, **options})
    cache = open_cache(folder, root=tmp_path / "cache")
    assert (
        open_cache(folder, root=tmp_path / "cache").unusual == cache.unusual
    )  # said again from the manifest
    return cache, cache.unusual


def test_nothing_odd_is_said_of_nothing_odd(tmp_path):
    put(tmp_path / "photos", 5)
    assert remarks(tmp_path)[1] == []


def test_copies_are_told_across_files_and_classes(tmp_path):
    put(tmp_path / "photos/cat", 5)
    put(tmp_path / "photos/dog", 3, start=10)
    for k in range(4):
        put_bytes(
            tmp_path / f"photos/dog/copy {k}.png",
            (tmp_path / f"photos/cat/{k:03d}.png").read_bytes(),
        )
    Image.open(tmp_path / "photos/dog/010.png").save(
        tmp_path / "photos/dog/another.bmp"
    )  # equal pixels, other bytes
    cache, lines = remarks(tmp_path)
    assert lines == [
        "exact copies: 5 of 13 images (dog/another.bmp = dog/010.png, dog/copy 0.png = "
        "cat/000.png, "
        "dog/copy 1.png = cat/001.png, ...); 4 of them are in another class"
    ]
    assert len(cache) == 13  # nothing is taken away


def test_small_images_are_told_and_can_be_left_out(tmp_path):
    put(tmp_path / "photos", 3, size=40)
    put(tmp_path / "photos", 2, start=10, size=12)
    cache, lines = remarks(tmp_path)
    assert lines == [
        "smaller than image_size, scaled up: 2 of 5 images (010.png, 011.png); "
        "min_side=16 leaves them out"
    ]
    cache, lines = remarks(tmp_path, min_side=16)
    assert lines == ["smaller than min_side, left out: 2 of 5 images (010.png, 011.png)"]
    assert (len(cache), cache.quarantine, cache.report()) == (3, [], "")  # they are not broken
    assert cache.small == ["010.png", "011.png"]
    assert "010.png\tsmaller than min_side" in (cache.path / "quarantine.txt").read_text()
    with pytest.raises(ValueError, match=r"no image is left: 5 of 5 are smaller than min_side"):
        remarks(tmp_path, min_side=41)
    assert "min_side=0" in refusal(root=tmp_path / "photos", min_side=0)


def test_images_of_one_colour_and_of_twelve_bits_are_told(tmp_path):
    put(tmp_path / "photos", 3)
    values = NOISE[0, ..., 0].astype(np.uint16).repeat(3, 0).repeat(3, 1)
    for k in range(2):
        Image.fromarray((values + k) * 16).save(tmp_path / f"photos/depth {k}.png")  # up to 12 bits
    Image.fromarray(values * 256).save(tmp_path / "photos/deep.png")  # all 16
    Image.new("RGB", (16, 16)).save(tmp_path / "photos/black.jpg")
    _, lines = remarks(tmp_path)
    assert lines == [
        "nearly of one colour: 3 of 7 images (black.jpg, depth 0.png, depth 1.png); 2 of them have "
        "more than 8 bits "
        "but use few of the values: multiply these in the files, by 16 where 12 bits are stored in "
        "16"
    ]


def test_a_cache_without_remarks_opens(tmp_path):
    put(tmp_path / "photos", 3)
    folder = Folder(root=tmp_path / "photos", image_size=16)
    cache = open_cache(folder, root=tmp_path / "cache")
    file = cache.path / "manifest.json"
    manifest = json.loads(file.read_text())
    for key in ("remarks", "small", "channels", "dtype", "seal"):  # as older versions wrote it
        del manifest[key]
    file.write_text(json.dumps({**manifest, "seal": seal(manifest)}))
    inode = (cache.path / "images.bin").stat().st_ino
    cache = open_cache(folder, root=tmp_path / "cache")
    assert (cache.unusual, cache.small, (cache.path / "images.bin").stat().st_ino) == (
        [],
        [],
        inode,
    )


def test_a_number_of_broken_images_may_be_accepted(tmp_path):
    put(tmp_path / "photos", 20)
    for k in range(2):
        put_bytes(tmp_path / f"photos/bad{k}.png")

    def opened(max_broken):
        data = folder_data(
            root=str(tmp_path / "photos"),
            image_size=16,
            cache=tmp_path / "cache",
            max_broken=max_broken,
        )
        return len(data.open())

    assert opened(2) == opened(1.0) == 20
    for few in (1, 0, 0.01):
        with pytest.raises(ValueError, match=r"accept so many with max_broken=2\."):
            opened(few)


# --- a start


def test_a_start_says_what_was_understood(tmp_path):
    base = [
        word for word in COMMON if not word.startswith(("data.source", "backbone."))
    ] + SMALL_DIT
    for k, split in enumerate(("train", "test")):
        put(tmp_path / f"photos/{split}/cat", 10, start=40 * k)
        put(tmp_path / f"photos/{split}/dog", 10, start=40 * k + 20)
    put_bytes(tmp_path / "photos/train/labels.csv")
    photos = tmp_path / "photos"
    base += ["trainer.max_steps=2", "trainer.val_check_interval=2", "data=folder"]
    refused = train(tmp_path, "mine", f"data.root={photos}", base=base, code=2)
    word = refused.stderr.splitlines()[2].split("  ")[1]
    assert word == f"data.root=[{photos}/train,{photos}/test]"
    said = train(tmp_path, "mine", word, base=base)
    lines = (said.stdout + said.stderr).splitlines()
    assert f"{photos}/train and {photos}/test: 40 images, classes: cat 20, dog 20" in lines
    assert "not used, as only folders give classes: labels.csv" in lines
