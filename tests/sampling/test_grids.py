"""What people look at is what the tensors hold."""

import numpy as np
import pytest
import torch
from PIL import Image

from sturdy.sampling.grids import class_columns, grid, save_png, to_uint8


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
