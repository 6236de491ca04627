"""Images come and go: which of them changed sides is counted, and how soon new ones are seen."""

import shutil

import numpy as np
import pytest
from test_split import draw, sides

from exact_resume.permutation import FeistelPermutation
from sturdy.data.changes import list_changes, new_images
from sturdy.data.datamodule import folder_data
from sturdy.data.sides import changes_since


@pytest.fixture
def photos(tmp_path):
    """Eighty small pictures in two classes."""
    for k in range(80):
        draw(tmp_path / "photos" / "ab"[k % 2] / f"{k:03d}.png", k)
    return tmp_path / "photos"


def opened(root, **options):
    options = {"image_size": 8, "holdout": 0.3, "split": "content"} | options
    data = folder_data(root=str(root), cache=root.parent / "cache", **options)
    data.open()
    return data


def add_and_remove(root):
    for k in range(100, 130):
        draw(root / "ab"[k % 2] / f"{k}.png", k)
    for k in range(0, 20, 3):
        (root / "ab"[k % 2] / f"{k:03d}.png").unlink()
    draw(root / "a/030.png", 1030)  # changed
    (root / "b/031.png").rename(root / "b/renamed.png")


def copy_and_move(root):
    """The same content under two names, and in another class."""
    shutil.copy(root / "a/040.png", root / "a/copy.png")
    shutil.copy(root / "a/042.png", root / "b/copy-of-another-class.png")
    for k in (41, 43, 45):
        (root / f"b/{k:03d}.png").rename(root / f"a/{k:03d}.png")


def bring_back(root):
    for k in range(0, 20, 3):
        draw(root / "ab"[k % 2] / f"again{k}.png", k)
    for k in range(130, 150):
        draw(root / "c" / f"{k}.png", k)


GROWTHS = (add_and_remove, copy_and_move, bring_back)


def ever(root, split):
    """The contents that were ever held out, and those that were ever trained on."""
    held_out, trained_on = sides(root, split, holdout=0.3)
    for grow in GROWTHS:
        grow(root)
        now = sides(root, split, holdout=0.3)
        held_out |= now[0]
        trained_on |= now[1]
    return held_out, trained_on


def test_over_three_growths_no_image_is_ever_on_both_sides(photos):
    held_out, trained_on = ever(photos, "content")
    assert len(held_out | trained_on) == 80 + 30 + 1 + 20
    assert held_out
    assert trained_on
    assert held_out & trained_on == set()


def test_control_by_count_many_are(photos):
    held_out, trained_on = ever(photos, "count")
    assert len(held_out & trained_on) > 20


@pytest.mark.parametrize("split", ["content", "count"])
def test_who_changed_sides_is_counted(photos, split):
    before = opened(photos, split=split)
    held_out, trained_on = sides(photos, split, holdout=0.3)
    add_and_remove(photos)
    after = opened(photos, split=split)
    held_out_now, trained_on_now = sides(photos, split, holdout=0.3)
    found = changes_since(after, before.digest, {"split": split, "holdout": 0.3})
    texts = [change.text for change in found]
    stayed = len(held_out & held_out_now)
    assert f"held out are {len(held_out_now)} images, {stayed} of them as before" in texts
    into_held_out = len(trained_on & held_out_now)
    into_training = len(held_out & trained_on_now)
    moved = [text for text in texts if "before, so" in text or "but held out before" in text]
    if split == "content":
        assert into_held_out == into_training == 0
        assert moved == []
    else:
        assert min(into_held_out, into_training) > 5
        assert moved[0].startswith(f"{into_held_out} of them are held out now, but trained on")
        assert moved[1].startswith(f"{into_training} images are trained on now, but held out")
        assert "split=content" in texts[-1]


def test_another_split_of_the_same_images_is_counted_too(photos):
    data = opened(photos, split="count")
    digest = data.cache.digest
    for other in ({"split": "content"}, {"split": "count", "holdout": 0.5}):
        now = opened(photos, **other)
        first, *moves = changes_since(now, digest, {"split": "count", "holdout": 0.3})
        assert first.text.startswith("held out are ")
        assert "trained on before" in moves[0].text
        assert len(moves[0].names) > 5


def test_all_names_are_kept_and_copies_are_no_new_images(photos):
    before = opened(photos)
    add_and_remove(photos)
    copy_and_move(photos)
    after = opened(photos)
    found = changes_since(after, before.digest)
    assert {change.text: len(change.names) for change in found} == {
        "30 images are new": 30,
        "2 images are copies of some that were there": 2,
        "7 images are gone": 7,
        "1 image changed": 1,
        "4 images were renamed or moved": 4,
    }
    lines = list_changes(found).splitlines()
    assert lines[:2] == ["30 images are new", "    a/100.png"]
    assert len(lines) == len(found) + 44
    named = {after.cache.names[i] for i in new_images(before.cache, after.cache)}
    assert named == {f"{'ab'[k % 2]}/{k}.png" for k in range(100, 130)} | {"a/030.png"}


@pytest.mark.parametrize("position", [0, 1, 999, 40_000, 123_456])
@pytest.mark.parametrize("n", [1000, 1013, 1500])
def test_after_a_growth_each_image_comes_within_two_epochs_and_none_much_more_often(position, n):
    order = FeistelPermutation(n, seed=3)
    seen = order(np.arange(position, position + 2 * n))
    assert set(seen.tolist()) == set(range(n))
    for length in (1, n // 3, n, 2 * n, 5 * n + 7):
        counts = np.bincount(order(np.arange(position, position + length)), minlength=n)
        assert counts.max() - counts.min() <= 2
