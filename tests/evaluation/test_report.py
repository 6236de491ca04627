"""A report says in Markdown what it holds in JSON, and its pictures are there."""

import json
import re

import numpy as np
import torch
from PIL import Image

from sturdy.diffusion.sampler import Step
from sturdy.evaluation.charts import chart
from sturdy.evaluation.report import Report, percent
from sturdy.evaluation.walk import film, walk
from sturdy.sampling.grids import to_uint8


def test_it_is_markdown_with_pictures_beside_it(tmp_path):
    report = Report(tmp_path / "new", "cars at step 7")
    report.heading("Part")
    table = report.table(["", "a|b"], [["recall", 0.123456], ["n", "1,000"]])
    report.picture("red.png", Image.new("RGB", (4, 3), "red"), "A picture")
    report.numbers = {"recall": 0.5, "none": float("nan"), "list": [1, float("inf")]}
    path = report.write()
    text = path.read_text()
    assert text.startswith("# cars at step 7\n\n## Part\n\n")
    assert table.splitlines() == [
        "|        | a\\|b   |",
        "| ------ | ------ |",
        "| recall | 0.1235 |",
        "| n      | 1,000  |",
    ]
    for name in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (path.parent / name).is_file()
    assert json.loads((path.parent / "report.json").read_text()) == {
        "recall": 0.5,
        "none": None,
        "list": [1, None],
    }
    assert sorted(p.name for p in path.parent.iterdir()) == ["red.png", "report.json", "report.md"]


def test_percent():
    assert (percent(0.1234), percent(1), percent(float("nan"))) == ("12.3 %", "100.0 %", "–")


def test_a_chart_shows_its_lines_where_they_belong():
    image = np.asarray(
        chart([0.1, 1, 10], {"low": [0.01, 0.01, 0.01], "high": [1, 0.1, 0]})
    ).astype(int)
    blue = np.argwhere(abs(image - [0x2F, 0x6F, 0xD0]).sum(2) == 0)
    orange = np.argwhere(abs(image - [0xE0, 0x7B, 0x1F]).sum(2) == 0)
    blue, orange = (points[points[:, 1] > 150] for points in (blue, orange))  # beside the legend
    assert blue[:, 0].mean() > orange[:, 0].max()  # below it
    assert np.ptp(blue[:, 0]) < 10 < np.ptp(orange[:, 0])
    assert chart([1, 2], {"nothing": [0, 0]}).size == (720, 400)


def test_a_film_runs_from_left_to_right(tmp_path):
    shades = torch.linspace(-0.4, 0.4, 21)
    steps = [
        Step(1 - i / 20, torch.full((2, 3, 4, 4), s), torch.full((2, 3, 4, 4), -s))
        for i, s in enumerate(shades)
    ]
    strip = np.asarray(film(steps, columns=5))
    assert strip.shape == (4 * 66 + 2, 5 * 66 + 2, 3)
    middles = strip[34::66, 34::66, 0]
    chosen = shades[[0, 5, 10, 15, 20]]
    states, estimates = (
        to_uint8(s.reshape(1, 1, 1, 5))[0, 0, :, 0].tolist() for s in (chosen, -chosen)
    )
    assert middles.tolist() == [states, estimates, states, estimates]
    report = Report(tmp_path, "walk")
    walk(report, steps[:3])
    assert (tmp_path / "walk.png").is_file()
