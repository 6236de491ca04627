"""Buckets: every image as often as any other, in batches of one size, from any position."""

from collections import Counter

import numpy as np
import pytest
from image_files import encode, quarters
from PIL import Image

from sturdy.data.buckets import (
    BucketOrder,
    batches_of_one_size,
    nearest_bucket,
    parse_buckets,
    parse_size,
)
from sturdy.data.datamodule import ImageData, folder_data
from sturdy.data.decode import UPRIGHT, decode, decode_file
from sturdy.data.folder import Folder

SIZES = [(8, 8), (6, 10), (10, 6), (4, 16)]


def sizes_of(counts):
    """``(n, 2)``: so many images of each size, mixed."""
    rows = [size for size, count in zip(SIZES, counts, strict=False) for _ in range(count)]
    return np.random.default_rng(0).permutation(np.array(rows))


def batch(order, k):
    return order(np.arange(k * order.batch_size, (k + 1) * order.batch_size))


def check_exact(order, sizes):
    """Each image comes B times in n batches, and a batch has one size."""
    n = len(sizes)
    for epoch in range(3):
        seen = Counter()
        for k in range(epoch * n, (epoch + 1) * n):
            indices = batch(order, k)
            assert len({tuple(size) for size in sizes[indices].tolist()}) == 1
            seen.update(indices.tolist())
        assert seen == dict.fromkeys(range(n), order.batch_size)


def check_pure(make):
    """Entered anywhere, in parts and in any sequence, the batches are the same."""
    whole = [batch(make(), k) for k in range(70)]
    for first in (0, 1, 37, 69):
        assert np.array_equal(batch(make(), first), whole[first])
    order = make()
    for k in (69, 3, 50, 3):
        positions = np.arange(k * order.batch_size, (k + 1) * order.batch_size)
        parts = [order(part) for part in np.array_split(positions, 2)]  # of two processes
        assert np.array_equal(np.concatenate(parts), whole[k])
    assert np.array_equal(order(np.arange(70 * order.batch_size)), np.concatenate(whole))


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("counts", [(1,), (9, 1), (13, 7, 25, 3), (1, 1, 1, 2)])
def test_every_image_comes_b_times_in_n_batches(counts, batch_size):
    sizes = sizes_of(counts)
    check_exact(BucketOrder(sizes, seed=3, batch_size=batch_size), sizes)


def test_entered_at_any_batch_it_is_the_same_order():
    check_pure(lambda: BucketOrder(sizes_of((13, 7, 3)), seed=0, batch_size=4))


class Remembering(BucketOrder):
    """A control: the rank of a batch is a count of calls, as in a sampler with state."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.calls = Counter()

    def rank(self, batch):
        bucket, _ = super().rank(batch)
        self.calls[bucket] += 1
        return bucket, self.calls[bucket] - 1


class Drawn(BucketOrder):
    """A control: the bucket of a batch is drawn by chance, as each process may do for itself."""

    def rank(self, batch):
        draw = np.random.default_rng([self.orders[0].seed, batch])
        return int(draw.choice(len(self.totals), p=self.totals / self.totals.sum())), batch


def test_controls_with_state_or_chance_are_noticed():
    sizes = sizes_of((13, 7, 3))
    with pytest.raises(AssertionError):
        check_pure(lambda: Remembering(sizes, seed=0, batch_size=4))
    with pytest.raises(AssertionError):
        check_exact(Drawn(sizes, seed=0, batch_size=4), sizes)


def test_an_image_comes_again_only_after_all_others_of_its_bucket():
    sizes = sizes_of((13, 7, 25))
    order = BucketOrder(sizes, seed=0, batch_size=4)
    streams = {size: [] for size in SIZES[:3]}
    for k in range(2 * len(sizes)):
        indices = batch(order, k)
        streams[tuple(sizes[indices[0]].tolist())] += indices.tolist()
    for size, stream in streams.items():
        n = order.counts[size]
        for first in range(0, len(stream) - n + 1, n):
            assert len(set(stream[first : first + n])) == n


def test_another_bucket_does_not_reshuffle_the_others():
    few = sizes_of((13, 7))
    more = np.concatenate([few, np.full((9, 2), 4)])  # comes first in the order of sizes
    streams = []
    for sizes in (few, more):
        order = BucketOrder(sizes, seed=0, batch_size=4)
        batches = [batch(order, k) for k in range(3 * len(sizes))]
        of_size = [b for b in batches if tuple(sizes[b[0]]) == SIZES[1]]
        streams.append(np.concatenate(of_size)[: 4 * 13])
    assert np.array_equal(*streams)


def test_seeds_give_other_orders():
    sizes = sizes_of((13, 7))
    a, b = (BucketOrder(sizes, seed=s, batch_size=4)(np.arange(40)) for s in (0, 1))
    assert not np.array_equal(a, b)


def test_held_out_images_are_in_batches_of_one_size_once_each():
    sizes = sizes_of((13, 7, 1))
    batches = batches_of_one_size(sizes, 4, end=15)
    assert sorted(np.concatenate(batches).tolist()) == list(range(15))
    for places in batches:
        assert len(places) <= 4
        assert len({tuple(size) for size in sizes[places].tolist()}) == 1


# --- Sizes


@pytest.mark.parametrize("image_size", [16, 64, 96, 512, 768, 1024])
def test_auto_has_about_the_area_of_a_square_and_even_sides(image_size):
    buckets = parse_buckets("auto", image_size)
    assert buckets[0] == (image_size, image_size)
    assert sorted(buckets) == sorted((w, h) for h, w in buckets)
    unit = 2 ** int(np.log2(image_size / 8))
    for height, width in buckets:
        assert height % unit == width % unit == 0
        assert 0.85 < height * width / image_size**2 < 1.15
    assert nearest_bucket(2000, 3000, buckets) != nearest_bucket(1000, 1000, buckets)


def test_sizes_are_height_by_width():
    assert parse_size("size", "48x80") == (48, 80)
    assert parse_buckets(["64x64", "48x80", "64x64"], 64) == [(64, 64), (48, 80)]
    assert nearest_bucket(50, 90, [(64, 64), (48, 80), (80, 48)]) == (48, 80)
    assert nearest_bucket(64, 64, [(128, 128), (64, 64)]) == (128, 128), "the first of several"
    # 1.25 is nearer to 1.5 by its logarithm, and equally near by its value
    assert nearest_bucket(125, 100, [(10, 10), (15, 10)]) == (15, 10)


@pytest.mark.parametrize("wrong", ["48", "48x", "x", "0x8", "48 x 80", "-4x4", 48, None, 1.5])
def test_what_is_no_size_is_refused(wrong):
    with pytest.raises(ValueError, match=r"size=.* must be height x width"):
        parse_size("size", wrong)


def test_buckets_that_make_no_sense_are_refused():
    for wrong in ([], ["48"], 48):
        with pytest.raises(ValueError, match="buckets="):
            parse_buckets(wrong, 64)
    with pytest.raises(ValueError, match="choose 96 or 104"):
        parse_buckets("auto", 100)
    with pytest.raises(ValueError, match="image_size=4"):
        parse_buckets("auto", 4)


# --- Decoding


def test_an_image_is_resized_to_cover_its_bucket_and_cut():
    wide = encode(quarters(40, 80), "PNG")
    found = decode_file(wide, 32, "center", (0, 0, 0), 10**6, buckets=[(32, 32), (24, 40)])
    assert found.pixels.shape == (3, 24, 40)
    assert found.cut == pytest.approx(1 - 40 / 48)  # of 24 x 48
    assert not found.is_scaled_up
    expected = decode(wide, size=24, crop="random")[:, :, 4:44]
    assert np.array_equal(found.pixels, expected), "as the centre of the whole image"
    assert decode_file(wide, 32, "center", (0, 0, 0), 10**6, buckets=[(64, 128)]).is_scaled_up


@pytest.mark.parametrize("orientation", [1, *UPRIGHT])
def test_the_bucket_is_that_of_the_upright_image(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(quarters(40, 80), "JPEG", quality=95, exif=exif.tobytes())
    upright = decode(data, size=24, crop="random")
    shape = upright.shape[1:]
    assert shape == ((48, 24) if orientation >= 5 else (24, 48))
    cut = decode(data, size=32, buckets=[(32, 32), (24, 40), (40, 24)])
    assert cut.shape[1:] == ((40, 24) if orientation >= 5 else (24, 40))
    rows, columns = (slice(4, 44), slice(0, 24))[:: 1 if orientation >= 5 else -1]
    assert np.abs(cut.astype(int) - upright[:, rows, columns]).max() <= 40, "the same image"


def test_a_large_jpeg_is_not_decoded_too_small():
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (160, 512, 3), dtype=np.uint8))
    image = noise.resize((1024, 320), Image.Resampling.BICUBIC)
    files = encode(image, "JPEG", quality=98, subsampling=0), encode(image, "PNG")
    jpeg, png = (decode(file, size=16, buckets=[(40, 128)]).astype(int) for file in files)
    assert np.abs(jpeg - png).mean() < 1  # an eighth of the JPEG would differ by 6


# --- A folder of wide and tall images


def write_images(folder, counts=((40, 80, 9), (80, 40, 9), (50, 50, 9), (20, 90, 2))):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for height, width, count in counts:
        for i in range(count):
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{height}-{width}-{i}.png")
    return folder


def open_folder(tmp_path, **settings):
    if not (tmp_path / "images").exists():
        write_images(tmp_path / "images")
    settings = {
        "image_size": 16,
        "buckets": "auto",
        "batch_size": 4,
        "split": "content",
        "cache": tmp_path / "cache",
        "holdout": 0.3,
    } | settings
    data = folder_data(root=tmp_path / "images", **settings)
    data.open()
    data.trainer = type("Trainer", (), {"global_step": 0})()
    return data


def test_batches_have_one_size_and_nothing_is_cropped_square(tmp_path):
    data = open_folder(tmp_path, num_workers=0)
    seen = set()
    batches = iter(data.train_dataloader())
    for _ in range(20):
        images, _, positions = next(batches)
        height, width = images.shape[2:]
        seen.add((height, width))
        names = data.names(positions)
        assert len(names) == 4
        for name in names:
            h, w = map(int, name.split("-")[:2])
            assert nearest_bucket(h, w, parse_buckets("auto", 16)) == (height, width)
    assert len(seen) == 4
    assert seen == set(data.sizes())


def test_the_start_says_which_buckets_there_are(tmp_path):
    data = open_folder(tmp_path)
    _, buckets, small, cut, *_ = data.summary_lines()
    assert buckets.startswith("buckets, height x width (images to train on + held out): 8x32 (")
    total = sum(int(c) for part in buckets.split("(")[2:] for c in part.split(")")[0].split(" + "))
    assert total == 29
    assert "buckets of fewer images than batch_size=4: 8x32 (" in small
    assert cut.startswith("cut off to fit the buckets: ")
    assert "16x16 0.0%" in cut
    assert open_folder(tmp_path).summary_lines()[3] == cut, "also when the cache was there"


def test_held_out_images_of_two_processes_are_those_of_one(tmp_path):
    data = open_folder(tmp_path)

    def validated(rank, processes):
        data.rank, data.processes = rank, processes
        return [b for b in data.val_dataloader()]

    alone = validated(0, 1)
    assert sum(len(b.positions) for b in alone) == data.held_out
    assert len({b.image.shape[2:] for b in alone}) > 2
    firsts = [int(b.positions[0]) for r in (0, 1) for b in validated(r, 2)]
    assert set(firsts) == {int(b.positions[0]) for b in alone}


def test_no_image_changes_sides(tmp_path):
    def held_out(**settings):
        data = open_folder(tmp_path, **settings)
        indices = data.split.indices(np.arange(data.held_out))
        return {data.cache.names[i] for i in indices}

    assert held_out() == held_out(buckets=None) == held_out(buckets=["8x32", "16x16"])


def test_without_buckets_nothing_changes(tmp_path):
    root = write_images(tmp_path / "images")
    assert Folder(root=root).key == Folder(root=root, buckets=None).key
    assert Folder(root=root).key != Folder(root=root, buckets="auto").key
    data = open_folder(tmp_path, buckets=None)
    assert data.sizes() == [(16, 16)]
    assert not isinstance(data.order, BucketOrder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"augment": 0.1}, "augment=0.1 must be 0 with buckets"),
        ({"balance": 0.5}, "balance=0.5 must be 0 with buckets"),
        ({"crop": "random"}, "crop=random does not go with buckets"),
        ({"buckets": ["16"]}, "buckets=16 must be height x width"),
    ],
)
def test_what_does_not_go_with_buckets_is_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        open_folder(tmp_path, **settings)


class Several:
    """A source of one's own, of two sizes."""

    classes = ()
    key = "several"

    def __len__(self):
        return 20

    def label(self, index):
        return 0

    def name(self, index):
        return str(index)

    def decode(self, index):
        shape = (3, 8, 12) if index % 3 else (3, 12, 8)
        return np.random.default_rng(index).integers(0, 256, shape, dtype=np.uint8)


def test_a_source_of_ones_own_needs_only_images_of_several_sizes(tmp_path):
    data = ImageData(Several(), image_size=8, buckets=True, batch_size=4, cache=tmp_path / "cache")
    data.open()
    data.trainer = type("Trainer", (), {"global_step": 0})()
    assert data.sizes() == [(8, 12), (12, 8)]
    images = data.train_dataloader().dataset
    order = data.order
    check_exact(order, data.cache.shapes[data.split.indices(np.arange(data.held_out, 20))])
    assert images[np.arange(4)].image.shape[1] == 3
    with pytest.raises(ValueError, match="several sizes"):
        images[np.arange(0, 80, 4)]  # no batch


def test_latents_are_cached_at_the_size_of_each_bucket(tmp_path):
    pytest.importorskip("diffusers")
    from sturdy.data.images import as_float
    from sturdy.pretrained.latents import Latents
    from tiny_vae import write_vae

    write_vae(tmp_path / "vae")
    space = Latents(path=str(tmp_path / "vae"))
    buckets = ["16x16", "8x24", "24x8"]
    pixels = open_folder(tmp_path, buckets=buckets)
    moments = open_folder(tmp_path, buckets=buckets)
    assert moments.encode_with(space)
    assert not moments.encode_with(space), "it is there already"
    live, cached = (data.train_dataloader().dataset for data in (pixels, moments))
    shapes = set()
    for k in range(0, 40, 4):
        a, b = (images[np.arange(k, k + 4)].image for images in (live, cached))
        shapes.add(b.shape[2:])
        expected = [space.moments(as_float(one[None])) for one in a]
        assert all(x[0].equal(y) for x, y in zip(expected, b, strict=True)), "mirrored ones, too"
    assert shapes == {(4, 4), (2, 6), (6, 2)}
    assert space.shape_of(8, 24) == (4, 2, 6)
