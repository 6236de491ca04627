"""The audit sees what is missing, what is too frequent and what is of the wrong class."""

import math
from itertools import combinations

import pytest
import torch

from exact_resume.randomness import generator
from sturdy.encoders.images import ImageSet
from sturdy.evaluation.audit import (
    accuracy,
    audit_section,
    frequencies,
    share_by_class,
    train_classifiers,
)
from sturdy.evaluation.report import Report

OPTIONS = {"shape": ("square", "bar"), "colour": ("red", "green", "blue")}


def drawn(shape, colour, seed):
    pixels = torch.randint(
        0, 90, (len(shape), 3, 16, 16), generator=generator(seed), dtype=torch.uint8
    )
    for picture, s, c in zip(pixels, shape.tolist(), colour.tolist(), strict=True):
        picture[c, 4:12, 4:12] = 240 if s == 0 else picture[c, 4:12, 4:12]
        picture[c, :, 6:9] = 240 if s == 1 else picture[c, :, 6:9]
    return ImageSet(pixels, shape, torch.empty(len(shape), 0), {"shape": shape, "colour": colour})


def balanced(n, seed):
    return drawn(torch.arange(n) % 2, torch.arange(n) // 2 % 3, seed)


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """Training and held-out pictures, and two classifiers."""
    train, held_out = balanced(300, "train"), balanced(60, "held out")
    folder = tmp_path_factory.mktemp("cache")
    how = {"seen": 2500, "data": ("digest",), "folder": folder, "tell": lambda done, total: None}
    return train, held_out, train_classifiers(train, OPTIONS, count=2, **how)


def test_good_samples_pass(judge, tmp_path):
    train, held_out, readers = judge
    report = Report(tmp_path, "good")
    audit_section(report, readers, balanced(120, "samples"), train, held_out, OPTIONS, "shape")
    assert report.numbers["classifier_accuracy"]["shape"] > 0.95
    assert report.numbers["class_accuracy"]["all"] > 0.95
    assert all(abs(f["samples"] - f["truth"]) < 0.05 for f in report.numbers["frequencies"])
    assert "class accuracy" in report.verdicts[0]
    assert any(
        "a quarter would be off by 4.0 points with 120 images" in block for block in report.blocks
    )


def test_a_missing_colour_and_a_wrong_class_are_seen(judge, tmp_path):
    train, held_out, readers = judge
    shape = torch.arange(120) % 2
    samples = drawn(shape, torch.arange(120) // 2 % 2, "samples")  # never blue
    wrong = ImageSet(
        samples.pixels, torch.where(torch.arange(120) < 30, 1 - shape, shape), samples.features, {}
    )
    report = Report(tmp_path, "bad")
    audit_section(report, readers, wrong, train, held_out, OPTIONS, "shape")
    assert report.numbers["class_accuracy"]["all"] == pytest.approx(0.75, abs=0.04)
    blue = next(f for f in report.numbers["frequencies"] if f["option"] == "blue")
    assert blue["samples"] < 0.02
    assert blue["truth"] == pytest.approx(1 / 3)
    assert "worst frequency: colour blue, -3" in report.verdicts[0]
    assert "rarest: colour" in report.verdicts[0]


def test_shares_by_hand():
    answers = {"shape": torch.tensor([[0, 0, 0, 1], [0, 0, 1, 1]])}  # of two readers
    none = {"shape": torch.tensor([0])}
    square, bar = frequencies({"shape": OPTIONS["shape"]}, none, answers, answers, none)
    assert (square.truth, square.samples, square.difference, square.ratio) == (
        1,
        0.625,
        -37.5,
        0.625,
    )
    assert (bar.samples, bar.known) == (0.375, 0)
    assert (square.spread, bar.spread) == (0.25, 0.25)
    assert math.isnan(bar.ratio)
    assert accuracy(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 0, 4])) == 0.75
    shares = share_by_class(torch.tensor([True, False, True]), torch.tensor([0, 0, 2]), 3)
    assert share_by_class(torch.tensor([[True, False, True]] * 2), torch.tensor([0, 0, 2]), 3)[
        ::2
    ] == [
        0.5,
        1,
    ]
    assert shares[0] == 0.5
    assert math.isnan(shares[1])
    assert shares[2] == 1


def test_between_two_options_readers_part_and_on_real_pictures_they_do_not(judge, tmp_path):
    train, held_out, readers = judge
    shape = torch.zeros(100, dtype=torch.int64)
    pure = [drawn(shape, torch.full((100,), colour), "same").pixels for colour in range(3)]

    def apart(pixels):
        report = Report(tmp_path, "apart")
        audit_section(
            report,
            readers,
            ImageSet(pixels, shape, torch.empty(100, 0), {}),
            train,
            held_out,
            OPTIONS,
            "shape",
        )
        return max(f["spread"] for f in report.numbers["frequencies"] if f["attribute"] == "colour")

    assert max(map(apart, pure)) < 0.02
    between = [
        torch.lerp(a.float(), b.float(), share).round().to(torch.uint8)
        for a, b in combinations(pure, 2)
        for share in (0.4, 0.5, 0.6)
    ]
    assert max(map(apart, between)) > 0.2
