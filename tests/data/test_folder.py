import os
import signal

import numpy as np
import pytest
from PIL import Image

from sturdy.data.folder import Folder, printable
from sturdy.data.source import BadImageError


def put(path, level=0):
    """A grey image file at ``path``, str or bytes."""
    os.makedirs(os.path.dirname(os.fsencode(path)), exist_ok=True)
    with open(path, "wb") as file:
        Image.new("RGB", (8, 8), (level,) * 3).save(file, "PNG")


def names(folder):
    return [folder.name(i) for i in range(len(folder))]


def test_flat_is_unlabelled_and_in_byte_order(tmp_path):
    for k, name in enumerate(
        ["b.PNG", "a.Jpg", "B.jpeg", "é.webp", "a-1.bmp", ".hidden.png", "notes.txt"]
    ):
        put(tmp_path / name, k)
    folder = Folder(root=tmp_path, image_size=8)
    assert names(folder) == ["B.jpeg", "a-1.bmp", "a.Jpg", "b.PNG", "é.webp"]
    assert folder.classes == ()
    assert [folder.label(i) for i in range(5)] == [0] * 5
    assert [int(folder.decode(i)[0, 0, 0]) for i in range(5)] == [2, 4, 1, 0, 3]


def test_a_folder_a_class(tmp_path):
    for name in [
        "truck/1.png",
        "truck/deep/er/2.png",
        "car/1.png",
        "car-2/1.png",
        ".git/1.png",
        "empty/readme",
    ]:
        put(tmp_path / name)
    folder = Folder(root=tmp_path)
    assert folder.classes == ("car", "car-2", "truck")
    assert [(folder.name(i), folder.label(i)) for i in range(4)] == [
        ("car-2/1.png", 1),
        ("car/1.png", 0),
        ("truck/1.png", 2),
        ("truck/deep/er/2.png", 2),
    ]
    unlabelled = Folder(root=tmp_path, labels=False)
    assert unlabelled.classes == ()
    assert names(unlabelled) == names(folder)
    assert unlabelled.key != folder.key


def test_one_folder_is_a_class_only_when_asked(tmp_path):
    put(tmp_path / "car/1.png")
    assert Folder(root=tmp_path).classes == ()
    assert Folder(root=tmp_path, labels=True).classes == ("car",)


def test_mixed_layouts_say_what_to_do(tmp_path):
    put(tmp_path / "car/1.png")
    put(tmp_path / "stray.png")
    for labels in ("auto", True):
        with pytest.raises(ValueError, match=r"stray.png.*labels=false"):
            Folder(root=tmp_path, labels=labels)
    assert len(Folder(root=tmp_path, labels=False)) == 2
    (tmp_path / "car/1.png").unlink()
    with pytest.raises(ValueError, match=r"labels=false"):
        Folder(root=tmp_path, labels=True)


def test_errors_say_what_was_looked_for(tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match=rf"root=.*far does not exist; the nearest folder that does is {tmp_path}$",
    ):
        Folder(root=tmp_path / "nowhere/far")
    (tmp_path / "a.txt").touch()
    with pytest.raises(NotADirectoryError, match="is a file"):
        Folder(root=tmp_path / "a.txt")
    for name in ("b.TXT", "c.txt", "sub/d.csv", "LICENSE"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"looked for .*\.jpeg .*found 3 \.txt") as error:
        Folder(root=tmp_path)
    assert "1 .csv" in str(error.value)
    assert "1 without a suffix" in str(error.value)
    assert str(tmp_path) in str(error.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no files at all"):
        Folder(root=tmp_path / "empty")
    for name in (".DS_Store", "._car.jpg"):
        (tmp_path / "empty" / name).touch()
    with pytest.raises(ValueError, match="found 2 hidden by a dot"):
        Folder(root=tmp_path / "empty")


def test_a_strangers_folder(tmp_path):
    for name in ("cars/1.JPG", "cars/old/2.png", "trucks/3.png"):
        put(tmp_path / name)
    for name in (".DS_Store", "cars/._1.JPG", "cars/Thumbs.db", "README.txt", "none/notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"not an image")
    folder = Folder(root=tmp_path)
    assert folder.classes == ("cars", "trucks")
    assert names(folder) == ["cars/1.JPG", "cars/old/2.png", "trucks/3.png"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"root": ""}, "is empty: give the folder"),
        ({"image_size": 0}, "image_size=0 must be a whole number of at least 1"),
        ({"image_size": -1}, "image_size=-1"),
        ({"image_size": 64.0}, "image_size=64.0"),
        (
            {"image_size": 100_000},
            "image_size=100000 makes images of more than max_pixels=100,000,000",
        ),
        ({"crop": "foo"}, "crop=foo must be one of center, random"),
        ({"labels": "foo"}, "labels=foo must be one of auto, true, false"),
        ({"labels": 1}, "labels=1"),
        ({"background": "foo"}, "background=foo must be a colour"),
        ({"background": [0, 0, 256]}, "background=.* must be a colour"),
        ({"background": [0, 0]}, "background="),
        ({"max_pixels": 0}, "max_pixels=0"),
    ],
)
def test_options_out_of_range_name_their_key(tmp_path, options, message):
    put(tmp_path / "1.png")
    with pytest.raises(ValueError, match=message):
        Folder(**{"root": tmp_path, **options})


def test_backgrounds(tmp_path):
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "1.png")
    for background, colour in (
        ("black", (0, 0, 0)),
        ("#ff8000", (255, 128, 0)),
        ([1, 2, 3], (1, 2, 3)),
    ):
        assert (
            tuple(Folder(root=tmp_path, image_size=8, background=background).decode(0)[:, 0, 0])
            == colour
        )
    assert (
        Folder(root=tmp_path, background="white").key
        == Folder(root=tmp_path, background=[255] * 3).key
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_named(tmp_path):
    put(tmp_path / "1.png")
    (tmp_path / "secret").mkdir(mode=0)
    with pytest.raises(PermissionError, match=r"data.root.*secret"):
        Folder(root=tmp_path)


def test_names_that_are_not_utf8(tmp_path):
    root = os.fsencode(tmp_path)
    put(root + b"/caf\xe9/\xff.png", 7)
    put(root + b"/new\nline/1.png", 9)
    folder = Folder(root=tmp_path, image_size=8)
    assert folder.classes == ("caf\\xe9", "new\\nline")
    assert names(folder) == ["caf\\xe9/\\xff.png", "new\\nline/1.png"]
    assert [folder.decode(i)[0, 0, 0] for i in range(2)] == [7, 9]
    assert printable("Käfer 🚗.png".encode()) == "Käfer 🚗.png"
    inside = Folder(root=os.fsdecode(root + b"/caf\xe9"), image_size=8)
    assert inside.decode(0)[0, 0, 0] == 7


def test_links_are_followed_and_loops_are_cut(tmp_path):
    put(tmp_path / "elsewhere/far.png", 5)
    root = tmp_path / "root"
    put(root / "a/1.png", 1)
    (root / "a/up").symlink_to(root)
    (root / "a/self").symlink_to(root / "a")
    (root / "b").symlink_to(tmp_path / "elsewhere")
    (root / "a/linked.png").symlink_to(tmp_path / "elsewhere/far.png")
    (tmp_path / "elsewhere/back").symlink_to(root / "a")
    signal.alarm(20)  # a walk that does not cut them grows without end
    folder = Folder(root=root, image_size=8)
    signal.alarm(0)
    # "up" leads to where the walk has been; "b/back" and "b" are new on their paths
    assert names(folder) == [
        "a/1.png",
        "a/linked.png",
        "b/back/1.png",
        "b/back/linked.png",
        "b/far.png",
    ]
    assert folder.classes == ("a", "b")
    assert [folder.decode(i)[0, 0, 0] for i in range(5)] == [1, 5, 1, 5, 5]


def test_dangling_links_and_pipes_are_listed_as_broken(tmp_path):
    put(tmp_path / "1.png")
    (tmp_path / "2.png").symlink_to("nowhere")
    os.mkfifo(tmp_path / "3.png")
    (tmp_path / "4.png").symlink_to("4.png")
    signal.alarm(20)  # opening the pipe would wait for ever
    folder = Folder(root=tmp_path)
    folder.decode(0)
    for index, reason in {1: "dangling link", 2: "not a regular file", 3: "link to itself"}.items():
        with pytest.raises(BadImageError, match=reason):
            folder.decode(index)
    signal.alarm(0)


def test_key_changes_with_files_and_preprocessing(tmp_path):
    put(tmp_path / "a/1.png", 1)
    put(tmp_path / "a/2.png", 2)
    options = {"root": tmp_path, "image_size": 8}
    keys = [Folder(**options).key]
    assert Folder(**options).key == keys[0]
    keys += [
        Folder(**options | change).key
        for change in (
            {"image_size": 9},
            {"crop": "random"},
            {"background": "black"},
            {"labels": True},
            {"max_pixels": 99},
        )
    ]
    put(tmp_path / "a/3.png")
    keys.append(Folder(**options).key)
    (tmp_path / "a/3.png").rename(tmp_path / "a/4.png")
    keys.append(Folder(**options).key)
    (tmp_path / "a/4.png").unlink()
    keys.append(Folder(**options).key)  # as at first
    assert keys.pop() == keys[0]
    # other content under the same name, size, inode and time of change: only ctime tells
    status = (tmp_path / "a/1.png").stat()
    put(tmp_path / "a/1.png", 3)
    os.utime(tmp_path / "a/1.png", ns=(status.st_atime_ns, status.st_mtime_ns))
    after = (tmp_path / "a/1.png").stat()
    assert (after.st_size, after.st_ino, after.st_mtime_ns) == (
        status.st_size,
        status.st_ino,
        status.st_mtime_ns,
    )
    keys.append(Folder(**options).key)
    assert len(set(keys)) == len(keys)


def test_random_crop_leaves_the_long_side(tmp_path):
    Image.new("RGB", (90, 30)).save(tmp_path / "1.png")
    assert Folder(root=tmp_path, image_size=10).decode(0).shape == (3, 10, 10)
    wide = Folder(root=tmp_path, image_size=10, crop="random").decode(0)
    assert (wide.shape, wide.dtype) == ((3, 10, 30), np.uint8)
