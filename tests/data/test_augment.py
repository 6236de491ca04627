"""Augmentation by position: what is done, and that the condition says it."""

import numpy as np
import pytest
import torch
from image_files import Noise
from test_datamodule import batches, opened

from exact_resume.randomness import Draws
from sturdy.data.augment import Augment, reflect
from sturdy.data.datamodule import ImageData

SIDE = 16
PICTURE = (
    torch.arange(3 * SIDE * SIDE).reshape(3, SIDE, SIDE) % 251
)  # no mirror, shift or turn of it is another


def augmented(probability=0.5, n=2000, seed=0, **options):
    image = PICTURE.to(torch.uint8).expand(n, 3, SIDE, SIDE)
    return Augment(probability, **options)(image, Draws(seed, range(n)))


def undone(image, condition, most):
    """The picture before, as far as it is inside the frame of the shifted one: values, and where
    they are known.
    """
    mirrored, down, right, *turns = condition.tolist()
    known = torch.ones(SIDE, SIDE, dtype=torch.bool)
    down, right = round(down * most), round(right * most)
    if down:
        known[SIDE - down if down > 0 else 0 : SIDE if down > 0 else -down] = False
    if right:
        known[:, SIDE - right if right > 0 else 0 : SIDE if right > 0 else -right] = False
    image = image.roll((-down, -right), (1, 2))
    for quarters, turned in enumerate(turns, 1):
        if turned:
            image, known = image.rot90(-quarters, (1, 2)), known.rot90(-quarters)
    return (image.flip(-1), known.flip(-1)) if mirrored else (image, known)


def test_the_condition_tells_what_was_done_pixel_by_pixel():
    image, condition = augmented(rotate=True, translate=0.25)
    assert condition.shape == (2000, 6)
    for x, a in zip(image, condition, strict=True):
        before, known = undone(x, a, most=4)
        assert torch.equal(before[:, known], PICTURE.to(torch.uint8)[:, known])
        assert known.float().mean() >= 9 / 16


def test_each_comes_with_its_probability_and_everything_is_reached():
    _, condition = augmented(0.3, n=4000, rotate=True, translate=0.25)
    near = 4 * (0.3 * 0.7 / 4000) ** 0.5
    assert condition[:, 0].mean() == pytest.approx(0.3, abs=near)
    assert condition[:, 3:].sum(1).mean() == pytest.approx(0.3, abs=near)
    assert (condition[:, 1:3] != 0).any(1).float().mean() == pytest.approx(0.3 * 80 / 81, abs=near)
    assert set((4 * condition[:, 1]).tolist()) == set(range(-4, 5))
    assert all(condition[:, k].any() for k in (3, 4, 5))
    independent = (condition[:, 0] * condition[:, 3:].sum(1)).mean()
    assert independent == pytest.approx(0.09, abs=4 * (0.09 * 0.91 / 4000) ** 0.5)


def test_zero_says_that_nothing_was_done():
    image, condition = augmented(0.5, n=500)
    assert condition.shape == (500, 3)
    plain = (condition == 0).all(1)
    assert 0.15 < plain.float().mean() < 0.4
    assert (image[plain] == PICTURE).all()
    assert not (image[~plain] == PICTURE).flatten(1).all(1).any()
    image, condition = augmented(0.0, n=50, rotate=True)
    assert (image == PICTURE).all()
    assert not condition.any()


def test_it_is_a_function_of_seed_and_position():
    image, condition = augmented(n=20, rotate=True)
    one = Augment(0.5, rotate=True)(PICTURE[None].to(torch.uint8), Draws(0, [13]))
    assert torch.equal(one[0][0], image[13])
    assert torch.equal(one[1][0], condition[13])
    assert not torch.equal(augmented(n=20, seed=1, rotate=True)[1], condition)


def test_what_comes_in_is_the_pictures_reflection():
    assert reflect(torch.arange(-3, 8), 5).tolist() == [3, 2, 1, 0, 1, 2, 3, 4, 3, 2, 1]
    x = np.pad(PICTURE.numpy(), ((0, 0), (4, 4), (4, 4)), mode="reflect")
    image, condition = augmented(n=200, translate=0.25)
    for y, (mirrored, down, right) in zip(image, condition.tolist(), strict=True):
        source = np.flip(x, -1) if mirrored else x
        top, side = 4 - round(4 * down), 4 - round(4 * right)
        assert np.array_equal(y.numpy(), source[:, top : top + SIDE, side : side + SIDE])


def test_training_batches_carry_the_condition_and_validation_is_plain(tmp_path):
    source = Noise(30)
    data = opened(tmp_path, source, augment=0.5, rotate=True, batch_size=10)
    plain = opened(tmp_path, source, batch_size=10)
    assert (data.augmentation_size, plain.augmentation_size) == (6, 0)
    for ours, theirs in zip(batches(data, 4), batches(plain, 4), strict=True):
        assert ours.augmentation.shape == (10, 6)
        same = (ours.augmentation == 0).all(1)
        assert torch.equal(ours.image[same], theirs.image[same])
        assert torch.equal(ours.label, theirs.label)
        assert len(theirs) == 3
    assert data.on_after_batch_transfer(ours, 0).image.min() >= -1
    assert all(len(batch) == 3 for batch in data.val_dataloader())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"augment": 2}, "augment=2 is a share"),
        ({"translate": -1}, "translate=-1 is a share"),
        ({"rotate": 90}, "rotate=90 must be one of true, false"),
    ],
)
def test_options_out_of_range_name_their_key(options, message):
    with pytest.raises(ValueError, match=message):
        ImageData(Noise(), image_size=8, **options)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_that_are_not_square_are_moved_pixel_by_pixel(channels):
    image = torch.arange(channels * 6 * 15).reshape(channels, 6, 15).to(torch.uint8)
    moved, condition = Augment(0.5, translate=0.34)(
        image.expand(500, -1, -1, -1), Draws(0, range(500))
    )
    for x, (mirrored, down, right) in zip(moved, condition.tolist(), strict=True):
        rows = reflect(torch.arange(6) - round(down * 2), 6)
        columns = reflect(torch.arange(15) - round(right * 5), 15)
        expected = image[:, rows][:, :, columns]
        assert torch.equal(x, image_mirrored(image, rows, columns) if mirrored else expected)


def image_mirrored(image, rows, columns):
    """The mirror image, moved."""
    return image.flip(-1)[:, rows][:, :, columns]
