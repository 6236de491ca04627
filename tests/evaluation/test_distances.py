"""Distances between sets of features: closed forms, a naive implementation, and sets that are bad
in known ways.
"""

import numpy as np
import pytest
import torch

from exact_resume.randomness import generator
from sturdy.evaluation.distances import frechet, kid, manifold, neighbour_distances

RNG = np.random.default_rng


def exactly(mean, covariance, n=400, seed=0):
    """``n`` points whose sample mean and covariance are exactly these."""
    x = RNG(seed).standard_normal((n, len(mean)))
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
    return torch.from_numpy(x @ np.linalg.cholesky(covariance).T + mean)


A = np.array([[2.0, 0.6, 0.0], [0.6, 1.0, 0.2], [0.0, 0.2, 0.5]])


@pytest.mark.parametrize(
    ("mean", "covariance", "distance"),
    [
        ([0, 0, 0], A, 0.0),
        ([3, 0, -4], A, 25.0),
        ([0, 0, 0], 4 * A, np.trace(A)),  # (2 - 1)^2 tr A
        ([1, 1, 1], A / 9, 3 + (1 - 1 / 3) ** 2 * np.trace(A)),
    ],
)
def test_frechet_of_gaussians_is_the_closed_form(mean, covariance, distance):
    found = frechet(exactly([0, 0, 0], A), exactly(mean, covariance, n=300, seed=1))
    assert found == pytest.approx(distance, abs=1e-5)  # a root of what rounding leaves of 0


def test_frechet_of_gaussians_that_do_not_commute():
    b = np.diag([0.5, 3.0, 1.0])
    values, vectors = np.linalg.eigh(A)
    root = vectors * np.sqrt(values) @ vectors.T
    expected = np.trace(A + b) - 2 * np.sqrt(np.linalg.eigvalsh(root @ b @ root)).sum()
    assert frechet(exactly([0, 0, 0], A), exactly([0, 0, 0], b, seed=1)) == pytest.approx(
        expected, abs=1e-6
    )


def naive_mmd(x, y):
    """The unbiased estimate, term by term."""
    k = lambda a, b: (a @ b / len(a) + 1) ** 3  # noqa: E731
    n, m = len(x), len(y)
    within = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within += sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


def test_kid_is_the_mean_over_halves_of_the_naive_estimate():
    x, y = RNG(0).standard_normal((40, 3)), RNG(1).standard_normal((40, 3)) + 0.5
    mean, _ = kid(torch.from_numpy(x), torch.from_numpy(y), subsets=400)
    assert mean == pytest.approx(naive_mmd(x, y), rel=0.1)  # halves of a U-statistic average to it
    assert kid(torch.from_numpy(x), torch.from_numpy(y)) == kid(
        torch.from_numpy(x), torch.from_numpy(y)
    )


def test_kid_of_equal_distributions_is_zero_and_its_error_bar_is_honest():
    drawn = [torch.from_numpy(RNG(seed).standard_normal((2, 200, 4))) for seed in range(40)]
    found = np.array([kid(x, y) for x, y in drawn])
    assert abs(found[:, 0].mean()) < 3 * found[:, 0].std() / np.sqrt(len(found))
    assert 0.8 < found[:, 1].mean() / found[:, 0].std() < 2.2
    apart = np.array([kid(x, y + 0.5) for x, y in drawn])
    assert 0.7 < apart[:, 1].mean() / apart[:, 0].std() < 1.5


def naive_manifold(real, fake, k, dense):
    """Ball by ball."""
    reach = lambda points, k: [np.sort(np.linalg.norm(points - p, axis=1))[k] for p in points]  # noqa: E731
    near, far, near_fake = reach(real, k), reach(real, dense), reach(fake, k)
    gap = np.linalg.norm(real[:, None] - fake[None], axis=2)
    n, m = gap.shape
    precision = np.mean([any(gap[i, j] <= near[i] for i in range(n)) for j in range(m)])
    recall = np.mean([any(gap[i, j] <= near_fake[j] for j in range(m)) for i in range(n)])
    density = sum(gap[i, j] <= far[i] for i in range(n) for j in range(m)) / (dense * m)
    coverage = np.mean([any(gap[i, j] <= far[i] for j in range(m)) for i in range(n)])
    return precision, recall, density, coverage


@pytest.mark.parametrize("chunk", [7, 512])
def test_the_manifold_is_the_naive_one(chunk):
    real, fake = RNG(0).standard_normal((60, 5)), 1.3 * RNG(1).standard_normal((45, 5)) + 0.4
    found = manifold(torch.from_numpy(real), torch.from_numpy(fake), k=3, dense=5, chunk=chunk)
    expected = naive_manifold(real, fake, 3, 5)
    assert (found.precision, found.recall, found.density, found.coverage) == pytest.approx(expected)
    assert found.inside.double().mean().item() == found.precision
    assert min(expected[:2]) > 0.1
    assert max(expected[:2]) < 0.95


def test_identical_sets_are_as_good_as_real():
    x = torch.randn(100, 6, generator=generator("x"))
    found = manifold(x, x.clone())
    assert (found.precision, found.recall, found.coverage) == (1, 1, 1)
    assert frechet(x, x.clone()) == pytest.approx(0, abs=1e-4)


def test_the_mean_image_has_precision_and_nothing_else():
    real = torch.randn(500, 8, generator=generator("real"))
    found = manifold(real, real.mean(0).repeat(300, 1))
    assert found.precision == 1
    assert found.recall == 0
    assert found.coverage < 0.1


def test_a_dropped_mode_is_missed_by_recall_and_coverage():
    centres = 30 * torch.eye(4)
    real, fake = (
        centres.repeat(100, 1) + torch.randn(400, 4, generator=generator(name))
        for name in ("real", "fake")
    )
    whole, part = manifold(real, fake), manifold(real, fake[torch.arange(400) % 4 != 0])
    assert min(whole.recall, whole.coverage, part.precision) > 0.9
    assert 0.6 < part.recall <= 0.75
    assert 0.6 < part.coverage <= 0.75


def test_radii_of_points_on_a_line():
    assert neighbour_distances(torch.tensor([[0.0], [1.0], [3.0], [7.0]]), 1, 2, 9).tolist() == [
        [1, 1, 2, 4],
        [3, 2, 3, 6],
        [7, 6, 4, 7],
    ]
    assert neighbour_distances(torch.zeros(3, 2), 2).tolist() == [[0, 0, 0]]
