"""Classes as often as is wanted, each of their images in turn, from any position."""

import numpy as np
import pytest
from image_files import Noise
from test_datamodule import batches, equal, opened

from sturdy.data.datamodule import ImageData
from sturdy.data.split import BalancedPermutation

LABELS = np.random.default_rng(0).permutation(
    np.repeat([0, 1, 3], [70, 25, 5])
)  # nobody is of class 2


class Rare(Noise):
    """Every eighth picture is of the second class."""

    def label(self, index):
        return int(index % 8 == 0)


@pytest.mark.parametrize(
    ("balance", "counts"),
    [
        (0.0, [71, 26, 5]),
        (0.5, [53, 30, 19]),
        (1.0, [34, 34, 34]),
    ],  # 102 slots: shares .7 .25 .05, or a third
)
def test_classes_come_as_often_as_is_wanted_in_every_epoch(balance, counts):
    order = BalancedPermutation(LABELS, 0, balance=balance)
    for epoch in range(3):
        found = np.bincount(LABELS[order(np.arange(102 * epoch, 102 * (epoch + 1)))])
        assert found[[0, 1, 3]].tolist() == pytest.approx(counts, abs=1)
        assert found.sum() == 102
        if balance == 1:
            assert found[[0, 1, 3]].tolist() == counts


def test_each_image_of_a_class_comes_as_often_as_the_others():
    """After 50 epochs of 34 each: 24 or 25 times one of 70, and 340 times one of 5."""
    seen = np.bincount(
        BalancedPermutation(LABELS, 0, balance=1.0)(np.arange(102 * 50)), minlength=100
    )
    assert set(seen[LABELS == 0]) == {24, 25}
    assert set(seen[LABELS == 1]) == {68}
    assert set(seen[LABELS == 3]) == {340}


def test_entered_anywhere_it_is_the_same_order_and_seeds_differ():
    order = BalancedPermutation(LABELS, 0, balance=0.7)
    whole = order(np.arange(500))
    for start, stop in ((0, 1), (37, 200), (101, 103), (499, 500)):
        assert np.array_equal(
            BalancedPermutation(LABELS, 0, balance=0.7)(np.arange(start, stop)), whole[start:stop]
        )
    assert (whole == BalancedPermutation(LABELS, 1, balance=0.7)(np.arange(500))).mean() < 0.2
    first, second = whole[:204].reshape(2, 102)
    assert (first == second).mean() < 0.2


def test_classes_are_spread_over_the_epoch():
    """The first tenth of each epoch has its share of the rare class: binomial, four standard
    deviations.
    """
    order = BalancedPermutation(LABELS, 3, balance=1.0)
    heads = np.concatenate([order(np.arange(102 * e, 102 * e + 10)) for e in range(200)])
    assert abs((LABELS[heads] == 3).mean() - 1 / 3) < 4 * (2 / 9 / 2000) ** 0.5


def test_far_away_it_costs_nothing():
    order = BalancedPermutation(LABELS, 0, balance=1.0)
    far = 102 * 10**12
    assert np.bincount(LABELS[order(np.arange(far, far + 102))])[[0, 1, 3]].tolist() == [34, 34, 34]


@pytest.mark.processes  # data workers
def test_training_is_balanced_and_the_prior_is_natural(tmp_path):
    data = opened(tmp_path, Rare(80), balance=1.0, batch_size=16, holdout=0.25)
    labels = np.concatenate([batch.label.numpy() for batch in batches(data, 30)])  # 8 epochs of 60
    assert labels.mean() == 0.5
    assert data.prior == [0.875, 0.125]
    held = [batch.label.numpy() for batch in data.val_dataloader()]
    assert np.concatenate(held).mean() < 0.3  # validation is natural
    again = opened(tmp_path, Rare(80), balance=1.0, batch_size=16, holdout=0.25, num_workers=2)
    assert equal(batches(again, 3), batches(data, 3))


def test_what_has_no_classes_cannot_be_balanced(tmp_path):
    class Plain(Noise):
        classes = ()

    with pytest.raises(
        ValueError, match=r"balance=0\.5 balances classes, and these images have none"
    ):
        opened(tmp_path, Plain(key="plain"), balance=0.5)
    assert opened(tmp_path, Plain(key="plain")).prior == []
    with pytest.raises(ValueError, match=r"balance=2 is a share"):
        ImageData(Noise(), image_size=8, balance=2)
