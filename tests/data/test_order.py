"""The order by position: a permutation every epoch, at any size, from any position, in constant
space.
"""

import numpy as np
import pytest

from exact_resume.permutation import FeistelPermutation


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000, 4097])
def test_every_image_exactly_once_per_epoch(n):
    order = FeistelPermutation(n, seed=3)
    for epoch in (0, 1, 7):
        indices = order(np.arange(epoch * n, (epoch + 1) * n))
        assert sorted(indices.tolist()) == list(range(n))


def test_entered_anywhere_it_is_the_same_order():
    order = FeistelPermutation(1000, seed=0)
    whole = order(np.arange(2500))
    for start, stop in ((0, 1), (37, 900), (990, 1010), (1999, 2001), (2499, 2500)):
        assert np.array_equal(order(np.arange(start, stop)), whole[start:stop])


def test_epochs_and_seeds_differ():
    first, second = FeistelPermutation(1000, seed=0)(np.arange(2000)).reshape(2, 1000)
    other = FeistelPermutation(1000, seed=1)(np.arange(1000))
    for a, b in ((first, second), (first, other)):
        assert (a == b).sum() < 10  # two random permutations agree in one place on average


def test_order_is_spread_evenly():
    """The first tenth of each epoch is a fair sample of the whole: a chi-square over ten bins, 200
    epochs.
    """
    n, epochs = 1000, 200
    order = FeistelPermutation(n, seed=5)
    head = np.concatenate([order(np.arange(e * n, e * n + n // 10)) for e in range(epochs)])
    counts = np.bincount(head // 100, minlength=10)
    expected = len(head) / 10
    assert (
        (counts - expected) ** 2 / expected
    ).sum() < 27.9  # 0.999 quantile of chi-square with 9 degrees


def test_a_billion_images_cost_nothing():
    order = FeistelPermutation(1_000_000_000, seed=0)
    positions = np.arange(5_000_000_000 - 500, 5_000_000_000 + 500)  # across the edge of an epoch
    indices = order(positions)
    assert indices.min() >= 0
    assert indices.max() < 1_000_000_000
    assert len(set(indices[:500].tolist())) == 500
    assert len(set(indices[500:].tolist())) == 500


def test_no_images_is_an_error():
    with pytest.raises(ValueError, match="at least one sample"):
        FeistelPermutation(0, seed=0)
