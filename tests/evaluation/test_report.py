"""A report says in Markdown what it holds in JSON, and its pictures are there."""

import json
import re

import numpy as np
import torch
from PIL import Image

from sturdy.diffusion.sampler import Step
from sturdy.evaluation.figures import image_table, log_chart
from sturdy.evaluation.report import Report, percent
from sturdy.evaluation.walk import select_steps, walk_section


def test_it_is_markdown_with_pictures_beside_it(tmp_path):
    report = Report(tmp_path / "new", "cars at step 7")
    report.introduction = "Two images."
    report.verdicts.append("good")
    report.heading("Part")
    table = report.table(["", "a|b"], [["recall", 0.123456], ["n", "1,000"]])
    report.image("red.png", Image.new("RGB", (4, 3), "red"), "An image")
    report.numbers = {"recall": 0.5, "none": float("nan"), "list": [1, float("inf")]}
    path = report.write()
    text = path.read_text()
    assert text.startswith("# cars at step 7\n\nTwo images.\n\n- good\n\n## Part\n\n")
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


def test_a_chart_has_logarithmic_axes_and_a_line_for_each_name(tmp_path):
    lines = {"low": [0.01, 0.01, 0.01], "high": [1, 0.1, 0]}
    figure = log_chart([0.1, 1, 10], lines, xlabel="noise", ylabel="error")
    axes = figure.axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["low", "high"]
    assert [list(line.get_ydata()) for line in axes.lines] == list(lines.values())
    Report(tmp_path, "chart").figure("chart.png", figure, "A chart")
    assert Image.open(tmp_path / "chart.png").width > 700


def test_a_table_of_images_has_each_where_it_belongs():
    shades = torch.linspace(-0.9, 0.9, 6).reshape(2, 3, 1, 1, 1).expand(2, 3, 3, 4, 8)
    axes = image_table(shades, columns=["a", "b", "c"], rows=["x", "y"]).axes[0]
    drawn = axes.images[0]
    assert drawn.get_extent() == [0, 3, 2, 0]
    pixels = np.asarray(drawn.get_array())
    assert pixels.shape == (2 * 4, 3 * 8, 3)
    expected = (shades[:, :, 0, 0, 0] + 1) * 127.5
    assert abs(pixels[2::4, 4::8, 0] - expected.numpy()).max() <= 0.5
    assert [text.get_text() for text in axes.get_xticklabels()] == ["a", "b", "c"]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["x", "y"]


def test_the_walk_shows_steps_from_the_first_to_the_last(tmp_path):
    steps = [
        Step(1 - i / 20, torch.full((2, 3, 4, 4), 0.1), torch.zeros(2, 3, 4, 4)) for i in range(21)
    ]
    times = [step.t for step in select_steps(steps)]
    assert len(times) == 10
    assert (times[0], times[-1]) == (steps[0].t, steps[-1].t)
    assert times == sorted(times, reverse=True)
    assert select_steps(steps[:3]) == steps[:3]
    report = Report(tmp_path, "walk")
    walk_section(report, steps[:3])
    assert (tmp_path / "walk.png").is_file()
