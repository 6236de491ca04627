"""The images that a run began with, found again whatever became of the folder; and what became of
it, by name.
"""

import json
import shutil

import pytest
from test_datamodule import Steps, batches, equal
from test_split import draw

from examples.cars.source import Cars
from sturdy.data.cache import Cache, find_cache, open_cache
from sturdy.data.cache_writer import seal
from sturdy.data.changes import describe_changes
from sturdy.data.datamodule import ImageData, folder_data
from sturdy.data.folder import Folder
from sturdy.data.sides import changes_since


@pytest.fixture
def photos(tmp_path):
    """Twenty small pictures in two classes."""
    for k in range(20):
        draw(tmp_path / "photos" / "ab"[k % 2] / f"{k:02d}.png", k)
    return tmp_path / "photos"


def opened(root, expected_digest=None, **options):
    options = {
        "image_size": 8,
        "batch_size": 4,
        "flip": True,
        "split": "content",
        "holdout": 0.3,
    } | options
    data = folder_data(root=str(root), cache=root.parent / "cache", **options)
    data.trainer = Steps()
    data.open(expected_digest)
    return data


def stream(data):
    """All that training sees of the data in three epochs, and validation."""
    return [*batches(data, 15), *data.val_dataloader()]


def caches(root):
    return len(list((root.parent / "cache").glob("*/manifest.json")))


def add(root):
    for k in range(20, 33):
        draw(root / "a" / f"new{k}.png", k)


def remove(root):
    (root / "b/01.png").unlink()
    (root / "b/03.png").unlink()


def rename(root):
    (root / "a/00.png").rename(root / "a/zz.png")


def touch(root):
    draw(root / "b/05.png", 99)


def add_a_class(root):
    draw(root / "c/0.png", 50)


def lose(root):
    shutil.rmtree(root)


def go_away(root):
    """As a network disk does: what is left is the empty folder that it was mounted on."""
    shutil.rmtree(root)
    root.mkdir()


@pytest.mark.parametrize(
    ("happens", "notes"),
    [
        (add, ["13 images are new, and not used (a/new20.png, a/new21.png, a/new22.png, ...)"]),
        (remove, ["2 images are gone, and still used (b/01.png, b/03.png)"]),
        (
            rename,
            [
                "1 image is new, and not used (a/zz.png)",
                "1 image is gone, and still used (a/00.png)",
            ],
        ),
        (touch, ["files were moved or written anew; the images that the run began with are used"]),
        (add_a_class, ["1 image is new, and not used (c/0.png)"]),
        (
            lose,
            [
                "does not exist; the nearest folder that does is",
                "The 20 images that the run began with are still in",
            ],
        ),
        (go_away, ["found no files at all. The 20 images that the run began with are still in"]),
    ],
    ids=lambda x: x.__name__ if callable(x) else "",
)
@pytest.mark.parametrize("split", ["content", "count"])
def test_a_run_goes_on_with_the_images_it_began_with(photos, happens, notes, split):
    first = opened(photos, split=split)
    expected = stream(first)
    happens(photos)
    again = opened(photos, expected_digest=first.digest, split=split)
    assert (again.digest, again.classes, again.prior) == (first.digest, first.classes, first.prior)
    assert equal(stream(again), expected)
    assert caches(photos) == 1  # nothing was decoded
    assert len(again.notes) == (1 if happens in (lose, go_away) else len(notes))
    assert all(text in line for text, line in zip(notes, again.notes * len(notes), strict=False))
    if happens in (lose, go_away):
        assert again.source is None
        with pytest.raises(
            (OSError, ValueError), match="root="
        ):  # the control: without it, there is no way
            opened(photos, split=split)
    else:
        now = opened(photos, split=split)
        assert now.digest != first.digest  # the control: without it, they are others
        named = [str(change) for change in changes_since(now, first.digest)]
        assert named == describe_changes(first.cache, now.cache)
        (unknown,) = changes_since(now, "0" * 64)
        assert "cannot be named" in str(unknown)


def test_nothing_is_said_where_nothing_changed(photos):
    first = opened(photos)
    again = opened(photos, expected_digest=first.digest)
    assert again.notes == []
    assert again.source.key == first.cache.key


def test_of_several_caches_of_the_same_images_that_of_the_source_is_taken(photos):
    first = opened(photos)
    for _ in range(3):  # each has another key, and the same digest
        copy = photos.with_name("copy")
        shutil.copytree(photos, copy)
        shutil.rmtree(photos)
        copy.rename(photos)
        opened(photos)
    again = opened(photos, expected_digest=first.digest)
    assert (again.notes, caches(photos)) == ([], 4)


def test_without_the_cache_the_folder_is_read_as_ever(photos):
    first = opened(photos)
    expected = stream(first)
    shutil.rmtree(first.cache.path)
    again = opened(photos, expected_digest=first.digest)
    assert again.digest == first.digest
    assert again.notes == [
        f"the images that the run began with are not in cache={photos.parent / 'cache'}: all "
        f"are read"
    ]
    assert equal(stream(again), expected)
    shutil.rmtree(again.cache.path)
    remove(photos)
    assert opened(photos, expected_digest=first.digest).digest != first.digest
    lose(photos)
    with pytest.raises(FileNotFoundError, match="root="):
        opened(photos, expected_digest="0" * 64)


def test_a_damaged_or_unfinished_cache_is_not_taken(photos, tmp_path):
    cache = open_cache(Folder(root=photos, image_size=8), root=tmp_path / "cache")
    assert find_cache(tmp_path / "cache", cache.digest).path == cache.path
    assert find_cache(tmp_path / "cache", cache.digest_with_contents).path == cache.path
    assert find_cache(tmp_path / "cache", "0" * 64) is None
    assert find_cache(tmp_path / "nowhere", cache.digest) is None
    building = cache.path.rename(cache.path.with_suffix(".building"))
    assert find_cache(tmp_path / "cache", cache.digest) is None
    building.rename(cache.path)
    with open(cache.path / "images.bin", "ab") as file:
        file.write(b"x")
    assert find_cache(tmp_path / "cache", cache.digest) is None


def older(cache):
    """Make ``cache`` as it was made before contents were kept."""
    manifest = json.loads((cache.path / "manifest.json").read_bytes())
    del manifest["seal"], manifest["digest_with_contents"], manifest["bytes"]["contents.npy"]
    (cache.path / "contents.npy").unlink()
    (cache.path / "manifest.json").write_text(json.dumps({**manifest, "seal": seal(manifest)}))
    return Cache(cache.path.rename(cache.path.with_name("0" * 32)))


def test_a_cache_of_an_older_version_still_serves_the_runs_that_began_with_it(photos):
    first = opened(photos, split="count")
    expected = stream(first)
    old = older(first.cache)
    assert old.contents is None
    add(photos)
    again = opened(photos, expected_digest=first.digest, split="count")
    assert again.cache.path == old.path
    assert equal(stream(again), expected)
    assert describe_changes(old, opened(photos).cache) == [
        "13 images are new (a/new20.png, a/new21.png, a/new22.png, ...)"
    ]
    assert (
        opened(photos, expected_digest=first.digest, split="content").cache.contents is not None
    )  # which an older one cannot


def test_what_changed_is_told_by_name(photos, tmp_path):
    def cache():
        return open_cache(
            Folder(root=photos, image_size=8), root=tmp_path / "cache", max_broken=0.5
        )

    old = cache()
    assert describe_changes(old, old) == [
        "the files are the same; their order differs, or how they are decoded"
    ]
    add(photos)
    remove(photos)
    rename(photos)
    touch(photos)
    add_a_class(photos)
    (photos / "a/02.png").write_bytes(b"")
    assert describe_changes(old, cache()) == [
        "14 images are new (a/new20.png, a/new21.png, a/new22.png, ...)",
        "2 images are gone (b/01.png, b/03.png)",
        "1 image changed (b/05.png)",
        "1 image was renamed or moved (a/00.png -> a/zz.png)",
        "1 image cannot be read any more (a/02.png)",
        "of the classes, c came; there are 3 now",
    ]
    new = cache()
    (photos / "b").rename(photos / "bus")
    lines = describe_changes(new, cache())
    assert lines[0].startswith("8 images were renamed or moved (b/05.png -> bus/05.png, ")
    assert lines[1] == "of the classes, bus came and b went; there are 3 now"


def test_drawn_cars_still_know_their_attributes(tmp_path):
    def data(n, expected_digest=None):
        data = ImageData(Cars(n=n, size=8), image_size=8, cache=tmp_path, split="content")
        data.open(expected_digest)
        return data

    first = data(12)
    again = data(12, first.digest)
    assert again.source.attributes(3) == first.source.attributes(3)
    other = data(15, first.digest)
    assert len(other.cache) == 12
    assert other.source.key != other.cache.key  # which is how to tell that indices may not fit
    assert other.notes == [
        "3 images are new, and not used (car-00000012, car-00000013, car-00000014)"
    ]
