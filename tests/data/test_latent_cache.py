"""Encoded images: the cache has what the encoder gives at every step, and belongs to its images."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import Noise, content
from PIL import Image

from exact_resume.randomness import Draws
from sturdy.data.cache import open_cache
from sturdy.data.datamodule import ImageData, folder_data
from sturdy.data.encoded import EncodedImages
from sturdy.data.images import as_float
from tiny_vae import CHANNELS, write_vae

pytest.importorskip("diffusers")

from sturdy.pretrained.latents import Latents

TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoded") / "vae"
    write_vae(path)
    return Latents(path=str(path))


def make_data(tmp_path, **settings):
    data = ImageData(
        Noise(n=12),
        **(
            {"image_size": 8, "batch_size": 4, "flip": True, "cache": tmp_path / "cache"} | settings
        ),
    )
    data.open()
    return data


def first_batches(data, dataset):
    """The batches of the first three steps, on the device."""
    batches = [dataset[np.arange(k, k + 4)] for k in (0, 4, 8)]
    return [data.on_after_batch_transfer(batch, 0) for batch in batches]


def training_set(data):
    data.trainer = type("Trainer", (), {"global_step": 0})()
    return data.train_dataloader().dataset


@pytest.mark.parametrize("flip", [True, False])
def test_cached_latents_are_those_of_every_step_bit_for_bit(space, tmp_path, flip):
    pixels, moments = make_data(tmp_path, flip=flip), make_data(tmp_path, flip=flip)
    assert moments.encode_with(space)
    assert not moments.encode_with(space), "it is there already"
    assert moments.digest == pixels.digest
    live = first_batches(pixels, training_set(pixels))
    cached = first_batches(moments, training_set(moments))
    for a, b in zip(live, cached, strict=True):
        assert b.image.shape == (4, 2 * CHANNELS, 2, 2)
        assert b.image.dtype == torch.float32
        draws = Draws(0, a.positions)
        assert torch.equal(space.encode(a.image, draws), space.encode(b.image, draws))
        assert torch.equal(a.label, b.label)
        assert np.array_equal(a.positions, b.positions)
    (a, *_), (b, *_) = pixels.val_dataloader(), moments.val_dataloader()
    a, b = (data.on_after_batch_transfer(x, 0) for data, x in ((pixels, a), (moments, b)))
    assert torch.equal(space.encode(a.image, None), space.encode(b.image, None))


def test_the_flip_of_a_position_takes_the_moments_of_the_mirrored_image(space, tmp_path):
    data = make_data(tmp_path)
    data.encode_with(space)
    n = len(data.cache)
    assert len(data.moments) == 2 * n
    positions = np.arange(16)
    batch = training_set(data)[positions]
    flipped = Draws(0, positions).uniform("flip") < 0.5
    assert 0 < flipped.sum() < 16
    indices = data.split.indices(data.held_out + data.order(positions))
    for row, index, is_flipped in zip(batch.image, indices, flipped, strict=True):
        image = as_float(torch.from_numpy(data.cache.image(index).copy())[None])
        mirrored = space.moments(image.flip(-1))[0]
        assert torch.equal(row, mirrored if is_flipped else space.moments(image)[0])
        assert not torch.equal(mirrored, space.moments(image)[0].flip(-1)), "why both are kept"


def keys(tmp_path, space, size=8, mirrored=True):
    images = open_cache(Noise(n=12, shape=(3, size, size), key=str(size)), root=tmp_path)
    return EncodedImages(images, space, size=size, mirrored=mirrored).key


def test_a_cache_belongs_to_images_size_flips_and_autoencoder(space, tmp_path):
    write_vae(tmp_path / "vae")
    (file,) = (tmp_path / "vae").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    other = Latents(path=str(tmp_path / "vae"))
    found = [
        keys(tmp_path, space),
        keys(tmp_path, space, size=16),
        keys(tmp_path, space, mirrored=False),
        keys(tmp_path, other),
    ]
    assert len(set(found)) == 4
    assert keys(tmp_path, space) == found[0]


def test_an_edited_image_is_encoded_again_and_an_edited_label_is_not(space, tmp_path):
    def encoded():
        data = folder_data(root=str(tmp_path / "photos"), image_size=16, cache=tmp_path / "cache")
        data.open()
        return data.encode_with(space), data.digest

    rng = np.random.default_rng(0)
    for name in ("a/1", "a/2", "b/3", "b/4"):
        path = tmp_path / "photos" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    was_made, first = encoded()
    assert was_made
    (tmp_path / "photos/b").rename(tmp_path / "photos/c")
    was_made, renamed = encoded()
    assert not was_made
    assert renamed != first
    Image.new("RGB", (16, 16), (9, 99, 199)).save(tmp_path / "photos/a/2.png")
    assert encoded()[0]


def test_what_moves_images_at_every_position_is_refused(space, tmp_path):
    with pytest.raises(ValueError, match=r"augment=0.5 must be 0"):
        make_data(tmp_path, augment=0.5).encode_with(space)
    with pytest.raises(ValueError, match=r"crop=random must be center.*image_size=4"):
        make_data(tmp_path, image_size=4).encode_with(space)


SLOW = """
import sys, time
from image_files import Noise
from sturdy.data.datamodule import ImageData
from sturdy.pretrained.latents import Latents

class Slow(Latents):
    def moments(self, image):
        time.sleep(0.05)
        print("encoded", flush=True)
        return super().moments(image)

data = ImageData(Noise(n=12), image_size=8, batch_size=4, flip=True, cache=sys.argv[1])
data.open()
data.encode_with(Slow(path=sys.argv[2]))
"""


def test_a_kill_while_it_is_made_leaves_nothing_half(space, tmp_path):
    words = [sys.executable, "-c", f"import sys; sys.path[:0] = {[str(TESTS / 'data'), *sys.path]}"]
    words[-1] += SLOW
    words += [str(tmp_path / "cache"), space.path]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(5):
        assert process.stdout.readline() == "encoded\n"
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    left = [path.name for path in (tmp_path / "cache").iterdir() if path.suffix == ".building"]
    assert len(left) == 1
    start = time.time()
    data = make_data(tmp_path)
    assert data.encode_with(space)
    assert not list((tmp_path / "cache").glob("*.building"))
    assert data.moments.path.stat().st_mtime >= start - 1
    whole = make_data(tmp_path / "untouched")
    whole.encode_with(space)
    assert content(data.moments) == content(whole.moments)
