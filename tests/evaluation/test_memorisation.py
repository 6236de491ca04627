"""Copies are told from new pictures of the same kind, and nothing else is."""

import numpy as np
import pytest
import torch

from exact_resume.randomness import generator
from sturdy.encoders.images import ImageSet
from sturdy.evaluation.memorisation import as_grey_levels, copy_stats, memorisation_section, nearest
from sturdy.evaluation.report import Report


def pixels(n, *seed):
    """Smooth random pictures, uint8."""
    coarse = torch.rand(n, 3, 4, 4, generator=generator(*seed))
    return (255 * torch.nn.functional.interpolate(coarse, size=8, mode="bilinear")).to(torch.uint8)


def pictures(pixels):
    return ImageSet(pixels, None, pixels.flatten(1).float() / 255, {})


def test_nearest_is_the_nearest_and_equal_pictures_are_at_zero():
    points, others = (
        as_grey_levels(pixels(30, "a")),
        as_grey_levels(torch.cat([pixels(50, "b"), pixels(3, "a")])),
    )
    distances, indices = nearest(points, others, chunk=7)
    gaps = np.linalg.norm(points.numpy()[:, None] - others.numpy()[None], axis=2)
    assert indices.tolist() == gaps.argmin(1).tolist()
    assert distances.numpy() == pytest.approx(gaps.min(1), abs=1e-4)
    assert distances[:3].tolist() == [0, 0, 0]


def test_levels_are_grey_levels():
    dark, light = as_grey_levels(
        torch.tensor([[[[10]], [[20]], [[30]]], [[[13]], [[23]], [[33]]]], dtype=torch.uint8)
    )
    assert (light - dark).norm().item() == pytest.approx(3)


def test_new_pictures_are_not_flagged_and_the_statistic_is_standard():
    train = as_grey_levels(pixels(300, "train"))
    found = []
    for seed in range(40):
        samples, held_out = (
            nearest(as_grey_levels(pixels(60, name, seed)), train)[0]
            for name in ("samples", "held out")
        )
        found.append(copy_stats(samples, held_out))
    z = np.array([f.z for f in found])
    assert abs(z.mean()) < 0.6
    assert 0.7 < z.std() < 1.4
    assert np.mean([f.copies for f in found]) < 0.05


def test_by_hand():
    f = copy_stats(torch.tensor([1.0, 2.0, 5.0]), torch.tensor([2.0, 4.0]))
    assert f.nearer == pytest.approx((2 + 1.5 + 0) / 6)  # of six pairs, a tie counting half
    assert f.z == pytest.approx((3 - 3.5) / np.sqrt(3 * 2 * 6 / 12))


@pytest.mark.parametrize("mirrored", [True, False])
def test_copies_are_flagged_also_mirrored_ones(tmp_path, mirrored):
    train, new = pixels(300, "train"), pixels(60, "new")
    noise = 2 * torch.randn(60, 3, 8, 8, generator=generator("noise"))
    copies = (train[:60].float() + noise).clamp(0, 255).to(torch.uint8)
    report = Report(tmp_path, "copies")
    samples = torch.cat([new[:30], copies[:15], copies[15:30].flip(-1)])
    memorisation_section(
        report, pictures(samples), pictures(train), pictures(new), mirrored=mirrored
    )
    found = report.numbers["memorisation_pixels"]
    assert found["copies"] == pytest.approx(0.5 if mirrored else 0.25)
    assert found["control"] == 1
    assert found["expected"] <= 0.02
    assert found["z"] < (-3 if mirrored else 0)
    assert report.verdicts[0].startswith(f"copies: {'50' if mirrored else '25'}.0 % in pixels")
    assert (tmp_path / "closest.png").is_file()
