"""Which images are held out by content: no image changes sides when others come, go, move or are
renamed.
"""

import hashlib
import shutil

import numpy as np
import pytest
from image_files import Noise
from PIL import Image
from test_datamodule import opened

from examples.cars.source import Cars
from sturdy.data.datamodule import ImageData, folder_data
from sturdy.data.split import Split

WAYS = [{"holdout": 0.1}, {"holdout": 0.3}, *({"fold": k, "folds": 4} for k in (1, 2, 3, 4))]


@pytest.fixture
def photos(tmp_path):
    """A hundred small pictures in two classes."""
    for k in range(100):
        draw(tmp_path / "photos" / "ab"[k % 2] / f"{k:03d}.png", k)
    return tmp_path / "photos"


def draw(path, k):
    path.parent.mkdir(parents=True, exist_ok=True)
    x = np.random.default_rng(k).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    Image.fromarray(x).save(path)


def sides(root, split="content", **options):
    """Contents of the held-out files, and of the others."""
    data = folder_data(
        root=str(root), cache=root.parent / "cache", split=split, **{"image_size": 8, **options}
    )
    data.open()
    files = [
        (root / data.cache.names[int(i)]).read_bytes()
        for i in data.split.indices(np.arange(len(data.cache)))
    ]
    return set(files[: data.held_out]), set(files[data.held_out :])


def crossed(before, after):
    """How many images are on one side before and on the other after."""
    return len(before[0] & after[1]) + len(before[1] & after[0])


def grow(root):
    for k in range(100, 160):
        draw(root / "ab"[k % 2] / f"{k % 7}-{k}.png", k)


def shrink(root):
    for k in range(0, 100, 3):
        (root / "ab"[k % 2] / f"{k:03d}.png").unlink()


def rename(root):
    for path in sorted(root.rglob("*.png")):
        path.rename(path.parent / f"{hashlib.sha256(path.read_bytes()).hexdigest()}.png")


def move(root):
    for path in sorted((root / "a").glob("*1*.png")) + sorted((root / "b").glob("*2*.png")):
        path.rename(root / "ab"[path.parent.name == "a"] / path.name)


def duplicate(root):
    for path in sorted(root.rglob("*.png"))[::2]:
        shutil.copy(path, path.parent / f"copy of {path.name}")


@pytest.mark.parametrize(
    "happens", [grow, shrink, rename, move, duplicate], ids=lambda f: f.__name__
)
def test_no_image_changes_sides_whatever_becomes_of_the_folder(photos, happens):
    before = [sides(photos, **way) for way in WAYS]
    by_count = [sides(photos, "count", **way) for way in WAYS]
    happens(photos)
    after = [sides(photos, **way) for way in WAYS]
    assert [crossed(a, b) for a, b in zip(before, after, strict=True)] == [0] * len(WAYS)
    assert all(held and rest and not held & rest for held, rest in after)
    by_count = [
        crossed(a, sides(photos, "count", **way)) for a, way in zip(by_count, WAYS, strict=True)
    ]
    assert all(by_count)  # the control


def test_neither_the_size_nor_the_crop_nor_the_classes_move_an_image(photos):
    expected = sides(photos)
    for options in (
        {"image_size": 5},
        {"crop": "random"},
        {"labels": False},
        {"seed": 3, "balance": 1.0},
    ):
        assert sides(photos, **options) == expected
    held = []
    for n, size in ((60, 8), (60, 9), (90, 8)):
        cars = ImageData(
            Cars(n=n, size=size), image_size=size, cache=photos.parent / "cache", split="content"
        )
        cars.open()
        held.append(
            {cars.cache.names[int(i)] for i in cars.split.indices(np.arange(cars.held_out))}
        )
    assert held[0] == held[1] == {name for name in held[2] if name < "car-00000060"}


def test_folds_cover_everything_once(photos):
    parts = [sides(photos, fold=k, folds=4) for k in (1, 2, 3, 4)]
    everything = {path.read_bytes() for path in photos.rglob("*.png")}
    assert set.union(*(held for held, _ in parts)) == everything
    assert sum(len(held) for held, _ in parts) == len(everything)
    assert all(held | rest == everything for held, rest in parts)


def test_shares_are_near_what_was_asked_at_a_million_images():
    n = 1_000_000
    contents = np.random.default_rng(0).integers(0, 2**64, n, dtype=np.uint64)
    for share in (0.001, 0.1, 0.5):
        held = len(Split.by_content(contents, share).held_out)
        assert abs(held - n * share) < 5 * (n * share * (1 - share)) ** 0.5
    parts = [Split.fold_by_content(contents, k, 7) for k in range(1, 8)]
    assert [part.held_out.stop for part in parts[:-1]] == [
        part.held_out.start for part in parts[1:]
    ]
    assert sum(len(part.held_out) for part in parts) == n
    assert np.array_equal(np.sort(parts[3].indices(np.arange(n))), np.arange(n))


def test_hashes_of_real_contents_are_spread_evenly(tmp_path):
    data = opened(tmp_path, Noise(2000, shape=(3, 1, 1)), split="content", holdout=0.25)
    same = np.unique(data.cache.contents).size
    assert same > 1990  # few pixels: some may be the same picture
    assert abs(data.held_out - 500) < 5 * (2000 * 0.25 * 0.75) ** 0.5


def test_at_least_one_is_held_out_and_one_is_not_and_copies_stay_together():
    low, high = np.uint64(2**60), np.uint64(2**64 - 1)
    for contents, share, held in (
        ([high, low], 0.01, [1]),  # none is below: the smallest
        ([low, low + np.uint64(1)], 0.9, [0]),  # all are: not the largest
        ([high, low, low], 0.01, [1, 2]),  # a copy goes along
        ([low, high, high], 1 - 1e-16, [0]),
        ([low, low, low], 0.1, [0]),  # one image three times: there is no other way
    ):
        split = Split.by_content(np.array(contents, dtype=np.uint64), share)
        assert split.indices(np.arange(len(split.held_out))).tolist() == held
    with pytest.raises(ValueError, match=r"fold=2 of folds=2 would hold out 0 of 2.*split=count"):
        Split.fold_by_content(np.array([low, low], dtype=np.uint64), 2, 2)
    with pytest.raises(ValueError, match="would hold out 2 of 2"):
        Split.fold_by_content(np.array([low, low], dtype=np.uint64), 1, 2)


def test_growing_a_tiny_set_never_holds_out_what_was_trained_on():
    rng = np.random.default_rng(0)
    for _ in range(300):
        contents = rng.integers(0, 2**64, 40, dtype=np.uint64)
        contents[0] = (
            2**63
        )  # never to be held out: if all were to be, one would have to be trained on all the same
        trained = set()
        for n in range(2, 40):
            split = Split.by_content(contents[:n], 0.1)
            places = split.indices(np.arange(n)).tolist()
            assert not trained & set(places[: len(split.held_out)])
            trained |= set(places[len(split.held_out) :])


def test_by_count_is_what_it_always_was():
    """The places of runs that began before there was a choice, written down then."""
    assert Split.by_count(12, 0.25).indices(np.arange(12)).tolist() == [
        5,
        9,
        0,
        4,
        7,
        6,
        1,
        3,
        11,
        8,
        2,
        10,
    ]
    second = Split.fold_by_count(12, 2, 5)
    assert (second.held_out, second.indices(np.arange(3)).tolist()) == (range(2, 4), [0, 4, 7])
    digest = hashlib.sha256()
    for n in (2, 3, 30, 1000, 4097):
        for split in (
            Split.by_count(n, 0.1),
            Split.by_count(n, 0.5),
            Split.fold_by_count(n, 1, 2),
            Split.fold_by_count(n, 2, 2),
        ):
            digest.update(
                repr(
                    (
                        split.held_out.start,
                        split.held_out.stop,
                        split.indices(np.arange(n)).tolist(),
                    )
                ).encode()
            )
    assert digest.hexdigest() == "be88ab9420ea20828c7a709bf78ad7ba25b28f47ca7bf6ae64a5fb7b3bc67736"


def test_a_class_made_without_the_key_keeps_the_older_way(photos):
    data = folder_data(root=str(photos), image_size=8, cache=photos.parent / "cache")
    data.open()
    assert (
        data.split.indices(np.arange(100)).tolist()
        == Split.by_count(100, 0.1).indices(np.arange(100)).tolist()
    )
    assert data.digest == data.cache.digest  # as in the manifests of those runs
    with pytest.raises(ValueError, match=r"split=name must be one of count, content"):
        folder_data(root=str(photos), split="name")


def test_the_digest_of_a_run_tells_what_its_split_depends_on(photos):
    """The same pixels in other bytes may be held out where they were not."""

    def digests():
        found = [
            folder_data(root=str(photos), image_size=8, cache=photos.parent / "c", split=s)
            for s in WORDS
        ]
        for data in found:
            data.open()
        return [data.digest for data in found]

    WORDS = ("count", "content")
    before = digests()
    Image.open(photos / "a/000.png").save(photos / "a/000.png", compress_level=0)
    after = digests()
    assert before[0] == after[0]
    assert before[1] != after[1]
