"""The stream of batches: by position alone, whatever the workers; and what is held out of it."""

import numpy as np
import pytest
import torch
from image_files import Noise
from PIL import Image

from sturdy.data.datamodule import Batch, ImageData, folder_data


class Steps:
    """As much of a trainer as the data asks for."""

    global_step = 0


def opened(tmp_path, source, **options):
    size = options.pop("image_size", source.shape[1])
    data = ImageData(source, image_size=size, cache=tmp_path / "cache", **options)
    data.trainer = Steps()
    data.open()
    return data


def batches(data, n):
    stream = iter(data.train_dataloader())
    return [next(stream) for _ in range(n)]


def equal(xs, ys):
    return all(
        torch.equal(x.image, y.image)
        and torch.equal(x.label, y.label)
        and np.array_equal(x.positions, y.positions)
        for x, y in zip(xs, ys, strict=True)
    )


@pytest.fixture
def photos(tmp_path):
    """Seven wide pictures whose columns are numbered, red telling the picture."""
    (tmp_path / "photos").mkdir()
    for k in range(7):
        x = np.stack([np.full(40, 10 * k), np.arange(40), np.zeros(40)], axis=-1).astype(np.uint8)
        Image.fromarray(np.repeat(x[None], 8, axis=0)).save(tmp_path / "photos" / f"{k}.png")
    return tmp_path / "photos"


def test_every_image_once_an_epoch_and_the_held_out_never(tmp_path):
    source = Noise(23)
    data = opened(tmp_path, source, batch_size=9, holdout=0.2)
    number = {source.decode(i).tobytes(): i for i in range(23)}
    held = [number[x.numpy().tobytes()] for batch in data.val_dataloader() for x in batch.image]
    seen = [
        number[x.numpy().tobytes()] for batch in batches(data, 6) for x in batch.image
    ]  # 54 = 3 epochs of 18
    assert len(held) == len(set(held)) == 5
    epochs = [seen[18 * k : 18 * k + 18] for k in range(3)]
    assert all(sorted(epoch) == sorted(set(range(23)) - set(held)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    labels = torch.cat([batch.label for batch in batches(data, 2)])
    assert labels.tolist() == [i % 2 for i in seen[:18]]


@pytest.mark.processes  # data workers
@pytest.mark.parametrize("crop", ["center", "random"])
def test_workers_and_the_step_of_entry_change_nothing(photos, tmp_path, crop):
    def stream(step, seed=0, **options):
        cache = tmp_path / "cache"
        data = folder_data(
            root=photos,
            image_size=8,
            crop=crop,
            flip=True,
            batch_size=4,
            cache=cache,
            seed=seed,
            **options,
        )
        data.trainer = Steps()
        data.load_state_dict({"step": 0, "position": 4 * step})
        data.open()
        return batches(data, 6)

    whole = stream(0)
    assert equal(stream(0, num_workers=2), whole)
    assert equal(stream(2)[:4], whole[2:])
    assert not equal(stream(0, seed=1), whole)  # the control


def test_random_crops_and_flips_reach_everywhere_and_validation_is_central(photos, tmp_path):
    data = folder_data(
        root=photos, image_size=8, crop="random", flip=True, holdout=0.5, cache=tmp_path / "cache"
    )
    data.trainer = Steps()
    data.open()
    image = torch.cat([batch.image for batch in batches(data, 10)])
    first, second = image[:, 1, 0, 0].int(), image[:, 1, 0, 1].int()
    flipped = second < first
    left = torch.where(flipped, first - 7, first)
    assert set(left.tolist()) == set(range(33))
    assert 0.4 < flipped.float().mean() < 0.6
    for batch in data.val_dataloader():
        assert torch.equal(
            batch.image[:, 1], torch.arange(16, 24).expand(len(batch.image), 8, 8).byte()
        )


def test_pixels_are_from_minus_one_to_one():
    data = ImageData(Noise(), image_size=8)
    bytes = torch.tensor([0, 51, 255], dtype=torch.uint8).expand(1, 3, 1, 3)
    batch = data.on_after_batch_transfer(Batch(bytes, torch.zeros(1), np.arange(1)), 0)
    assert batch.image[0, 0, 0].tolist() == pytest.approx([-1, -0.6, 1])


@pytest.mark.parametrize(("n", "held"), [(2, 1), (3, 1), (30, 3)])
def test_few_images(tmp_path, n, held):
    data = opened(tmp_path, Noise(n), holdout=0.1)
    assert data.held_out == held
    assert sum(len(batch.image) for batch in data.val_dataloader()) == held
    assert len(batches(data, 1)[0].image) == 64


def test_what_cannot_be_trained_on(tmp_path):
    with pytest.raises(ValueError, match="one image only"):
        opened(tmp_path, Noise(1))
    with pytest.raises(ValueError, match="image_size=16 is more than the 8 x 8 pixels of noise"):
        opened(tmp_path, Noise(4, key="four"), image_size=16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "image_size=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 8, "shards": 3}, "batch_size=8 cannot be cut into shards=3"),
        ({"shards": 0}, "shards=0"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"flip": "no"}, "flip=no must be one of true, false"),
        ({"max_broken": 1.5}, "max_broken=1.5 is a share"),
        ({"holdout": 20}, "holdout=20 is a share"),
        ({"holdout": 0}, "holdout=0"),
    ],
)
def test_options_out_of_range_name_their_key(options, message):
    with pytest.raises(ValueError, match=message):
        ImageData(Noise(), **{"image_size": 8, **options})


class Grey(Noise):
    """Images of one channel that are not square."""

    channels = 1

    def decode(self, index):
        return super().decode(index)[:1]


@pytest.mark.parametrize("size", [(8, 12), (12, 8)])
def test_images_that_are_not_square_and_of_one_channel(tmp_path, size):
    source = Grey(9, shape=(3, 12, 14), key="grey")
    data = opened(tmp_path, source, image_size=size, batch_size=4, flip=True)
    [batch] = batches(data, 1)
    assert batch.image.shape == (4, 1, *size)
    names = [source.name(index) for index in range(9)]
    for image, name in zip(batch.image, data.names(batch.positions), strict=True):
        whole = torch.from_numpy(source.decode(names.index(name)))
        parts = whole.unfold(1, size[0], 1).unfold(2, size[1], 1)  # (1, tops, lefts, h, w)
        upright = (parts == image).all((-1, -2)).any()
        mirrored = (parts == image.flip(-1)).all((-1, -2)).any()
        assert upright ^ mirrored
    again = opened(tmp_path, source, image_size=list(size), batch_size=4, flip=True)
    assert equal([batch], batches(again, 1))


def test_a_pair_of_equal_sides_is_one_number(tmp_path):
    assert opened(tmp_path, Noise(4, key="pair"), image_size=[8, 8]).image_size == 8


@pytest.mark.parametrize("size", [[8], [8, 0], [8, 8, 8], "88", [8.0, 8], True])
def test_other_sizes_are_refused(size):
    with pytest.raises(ValueError, match=r"image_size=.* must be a whole number of at least 1, or"):
        ImageData(Noise(), image_size=size)


def test_only_squares_are_turned():
    with pytest.raises(ValueError, match="rotate=True turns by quarters, which only squares"):
        ImageData(Noise(), image_size=[8, 12], augment=0.1, rotate=True)
