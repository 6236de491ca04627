"""Caches: what they hold, when they are made again, and what a user is told of broken images."""

import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from image_files import Noise, Slow, content, only_the_cache
from PIL import Image

from sturdy.data.cache import TooManyBrokenError, open_cache
from sturdy.data.datamodule import ImageData
from sturdy.data.folder import Folder

fork = multiprocessing.get_context("fork")


@pytest.fixture
def photos(tmp_path):
    """Twenty files each of two classes, one in three a PNG."""
    rng = np.random.default_rng(0)
    for k in range(40):
        path = (
            tmp_path
            / "photos"
            / ("car" if k % 2 else "truck")
            / f"{k:02d}.{'jpg' if k % 3 else 'png'}"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        x = rng.integers(0, 256, (6, 6 + k % 5, 3), dtype=np.uint8)
        Image.fromarray(x).resize((16 * x.shape[1], 96)).save(path)
    return tmp_path / "photos"


def test_holds_what_the_source_gives(photos, tmp_path):
    folder = Folder(root=photos, image_size=24)
    told = []
    cache = open_cache(
        folder, root=tmp_path / "cache", progress=lambda done, total: told.append((done, total))
    )
    assert len(cache) == len(folder) == 40
    assert cache.classes == ("car", "truck")
    for i in range(40):
        assert np.array_equal(cache.image(i), folder.decode(i))
        assert (cache.labels[i], cache.names[i]) == (folder.label(i), folder.name(i))
    assert told[-1] == (40, 40)
    assert cache.report() == ""
    assert only_the_cache(tmp_path / "cache")
    with pytest.raises(ValueError, match="read-only"):
        cache.image(0)[:] = 0


def test_ragged(photos, tmp_path):
    folder = Folder(root=photos, image_size=24, crop="random")
    cache = open_cache(folder, root=tmp_path / "cache")
    assert len(np.unique(cache.shapes, axis=0)) > 1
    assert all(np.array_equal(cache.image(i), folder.decode(i)) for i in range(40))
    assert np.array_equal(cache.image(-1), folder.decode(39))
    with pytest.raises(IndexError):
        cache.image(40)


def test_the_number_of_workers_changes_nothing(photos, tmp_path):
    (photos / "car/01.jpg").write_bytes(b"")
    source = Folder(root=photos, image_size=24, crop="random")
    one, *others = [
        open_cache(source, root=tmp_path / str(workers), workers=workers, max_broken=0.1)
        for workers in (0, 1, 3)
    ]
    for other in others:
        assert content(other) == content(one)
        assert other.quarantine == one.quarantine == [("car/01.jpg", "empty")]


def test_a_second_start_reads_what_is_there(tmp_path):
    source = Slow(tmp_path / "decoded")
    first = open_cache(source, root=tmp_path / "cache")
    again = open_cache(source, root=tmp_path / "cache")
    assert (tmp_path / "decoded").stat().st_size == 30
    assert content(again) == content(first)


def test_a_changed_file_is_decoded_again(photos, tmp_path):
    first = open_cache(Folder(root=photos, image_size=24), root=tmp_path / "cache")
    Image.new("RGB", (30, 30), (1, 2, 3)).save(photos / "car/03.png")
    second = open_cache(Folder(root=photos, image_size=24), root=tmp_path / "cache")
    third = open_cache(Folder(root=photos, image_size=25), root=tmp_path / "cache")
    assert len({first.path, second.path, third.path}) == 3
    assert len({first.digest, second.digest, third.digest}) == 3


def test_digest_is_of_the_content_alone(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "copy")
    here, there = Folder(root=photos, image_size=24), Folder(root=tmp_path / "copy", image_size=24)
    assert here.key != there.key
    digest = open_cache(here, root=tmp_path / "cache").digest
    assert open_cache(there, root=tmp_path / "cache").digest == digest
    (tmp_path / "copy/car").rename(tmp_path / "copy/bus")  # same order, another class
    assert (
        open_cache(Folder(root=tmp_path / "copy", image_size=24), root=tmp_path / "cache").digest
        != digest
    )


def test_broken_images_are_left_out_with_a_reason(photos, tmp_path):
    (photos / "car/01.jpg").write_bytes((photos / "car/01.jpg").read_bytes()[:400])
    (photos / "truck/02.jpg").write_text("hello")
    (photos / "truck/zz.png").symlink_to("nowhere")
    folder = Folder(root=photos, image_size=24)
    with pytest.raises(
        TooManyBrokenError, match=r"7.32% of .*max_broken=0.01 accepts: 3 of 41 images"
    ) as error:
        open_cache(folder, root=tmp_path / "cache")
    assert "truck/zz.png  dangling link" in str(error.value)
    made = [path.stat().st_ino for path in (tmp_path / "cache").glob("*/images.bin")]
    cache = open_cache(folder, root=tmp_path / "cache", max_broken=0.1)
    assert made == [(cache.path / "images.bin").stat().st_ino]  # nothing was decoded twice
    assert len(cache) == len(cache.labels) == 38
    assert [name for name, _ in cache.quarantine] == ["car/01.jpg", "truck/02.jpg", "truck/zz.png"]
    assert [why for _, why in cache.quarantine][1:] == [
        "not a JPEG, PNG, WebP, BMP, GIF, TIFF, AVIF or JPEG 2000 image",
        "dangling link",
    ]
    assert cache.report().splitlines()[0] == "3 of 41 images are left out:"
    short = cache.report(most=2).splitlines()
    assert len(short) == 3
    listed = (cache.path / "quarantine.txt").read_text()
    assert str(cache.path / "quarantine.txt") in short[0]
    assert [line.split("\t") for line in listed.splitlines()] == [
        list(row) for row in cache.quarantine
    ]
    assert cache.names[0] == "car/03.png"
    with pytest.raises(TooManyBrokenError):  # a cache that is there is judged too
        open_cache(folder, root=tmp_path / "cache", max_broken=0.01)


def test_all_broken_is_an_error_always(tmp_path):
    with pytest.raises(TooManyBrokenError, match="all 30 images are broken"):
        open_cache(Noise(broken=1), root=tmp_path, max_broken=1.0)
    assert len(open_cache(Noise(broken=2, key="half"), root=tmp_path, max_broken=0.5)) == 15


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: os.truncate(path / "images.bin", 1000),
        lambda path: os.truncate(path / "labels.npy", 100),
        lambda path: (path / "shapes.npy").unlink(),
        lambda path: (path / "manifest.json").unlink(),
        lambda path: os.truncate(path / "manifest.json", 50),
        lambda path: (path / "manifest.json").write_text(
            (path / "manifest.json").read_text().replace("odd", "old")
        ),
        lambda path: (path / "manifest.json").write_text("[]"),
    ],
)
def test_damage_is_noticed_and_mended(tmp_path, damage):
    cache = open_cache(Noise(), root=tmp_path)
    expected = content(cache)
    damage(cache.path)
    assert content(open_cache(Noise(), root=tmp_path)) == expected
    assert only_the_cache(tmp_path)


def test_pickles_as_its_path_and_opens_in_a_new_process(tmp_path):
    cache = open_cache(Noise(200), root=tmp_path)
    assert len(pickle.dumps(cache)) < 500
    program = """if True:
        import pickle, sys
        cache = pickle.load(sys.stdin.buffer)
        print(cache.image(5).sum(), cache.names[3], cache.digest)
    """
    found = subprocess.run(
        [sys.executable, "-c", program], input=pickle.dumps(cache), capture_output=True, check=True
    )
    assert found.stdout.decode().strip() == f"{cache.image(5).sum()} noise 3 {cache.digest}"
    with fork.Pool(2) as pool:
        assert pool.map(cache.image, [1, 2])[1].tobytes() == cache.image(2).tobytes()
        pool.close()
        pool.join()  # without SIGTERM


class FourFloats(Noise):
    """Latents: four channels of floats, of several widths."""

    channels = 4
    dtype = "float32"

    def decode(self, index):
        rng = np.random.default_rng(index)
        return rng.standard_normal((4, 8, 8 + self.step * (index % 3)), dtype=np.float32)


@pytest.mark.parametrize("step", [0, 1])
def test_the_source_decides_about_channels_and_type(tmp_path, step):
    source = FourFloats(key=f"latents {step}")
    source.step = step
    cache = open_cache(source, root=tmp_path)
    assert (cache.channels, cache.dtype, len(np.unique(cache.shapes))) == (
        4,
        np.float32,
        1 + 2 * step,
    )
    assert all(np.array_equal(cache.image(i), source.decode(i)) for i in range(30))
    data = ImageData(source, image_size=8, cache=tmp_path, holdout=0.5)
    data.open()
    image = next(iter(data.val_dataloader())).image
    assert (image.shape, image.dtype) == ((15, 4, 8, 8), torch.float32)
    indices = data.split.indices(np.arange(15))
    batch = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
    if step == 0:
        assert np.array_equal(batch.image, np.stack([source.decode(i) for i in indices]))


def test_a_source_that_decodes_something_else_is_refused(tmp_path):
    source = Noise(shape=(1, 8, 8))
    with pytest.raises(TypeError, match=r"gave uint8 \(1, 8, 8\), not uint8 \(3, h, w\)"):
        open_cache(source, root=tmp_path)
