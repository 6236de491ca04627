"""What people look at is what the tensors hold."""

import numpy as np
import pytest
import torch
from PIL import Image

from sturdy.sampling.grids import as_image, class_columns, grid, save_png, to_uint8


def test_levels_are_rounded_and_clipped():
    x = (
        torch.tensor([-2.0, -1.0, 0.0, 1 / 127.5 * 0.49, 1.0, 3.0])
        .reshape(1, 1, 1, 6)
        .expand(1, 3, 1, 6)
    )
    assert to_uint8(x)[0, 0, :, 0].tolist() == [0, 0, 128, 128, 255, 255]


def test_every_level_of_a_picture_survives():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(to_uint8(levels.float() / 127.5 - 1), levels.permute(0, 2, 3, 1))


def test_pictures_lie_row_by_row():
    shades = torch.linspace(-1, 1, 6)[:, None, None, None].expand(6, 3, 8, 8)
    sheet = np.asarray(grid(shades, columns=3, tile=16, gap=1))
    assert sheet.shape == (2 * 17 + 1, 3 * 17 + 1, 3)
    middles = sheet[[1 + 8, 18 + 8]][:, [1 + 8, 18 + 8, 35 + 8], 0]
    assert middles.flatten().tolist() == to_uint8(shades)[:, 0, 0, 0].tolist()


@pytest.mark.parametrize(
    ("n", "classes", "columns"),
    [(64, 8, 8), (64, 2, 8), (40, 8, 8), (9, 4, 4), (64, 100, None), (9, 0, None)],
)
def test_a_column_is_a_class(n, classes, columns):
    assert class_columns(n, classes) == columns


def test_a_picture_is_written_whole(tmp_path):
    path = tmp_path / "new" / "a.png"
    save_png(Image.new("RGB", (3, 2), "red"), path)
    assert np.asarray(Image.open(path)).tolist() == [[[255, 0, 0]] * 3] * 2
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_an_image_of_any_number_of_channels(channels):
    pixels = torch.arange(4 * 6 * channels, dtype=torch.uint8).reshape(4, 6, channels)
    image = as_image(pixels)
    shown = np.asarray(image)
    if channels == 3:
        assert np.array_equal(shown, pixels)
    else:
        assert image.mode == "L"
        assert np.array_equal(shown, np.concatenate([*pixels.numpy().transpose(2, 0, 1)], axis=1))


def test_a_grid_of_grey_images_that_are_not_square():
    shades = torch.linspace(-1, 1, 4)[:, None, None, None].expand(4, 1, 8, 12)
    sheet = np.asarray(grid(shades, columns=2, tile=24, gap=1))
    assert sheet.shape == (2 * 17 + 1, 2 * 25 + 1, 3)
    assert sheet[[9, 26]][:, [13, 38], 0].flatten().tolist() == [0, 85, 170, 255]
