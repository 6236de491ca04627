"""Which images are held out: a share or a fold of the same order, the same for every seed."""

import numpy as np
import pytest
from image_files import Noise
from test_datamodule import batches, opened

from exact_resume.permutation import FeistelPermutation
from sturdy.data.datamodule import ImageData
from sturdy.data.split import Split


def places(split):
    """Held-out images, and the others."""
    all = split.indices(np.arange(split.n)).tolist()
    return all[: len(split.held_out)], all[len(split.held_out) :]


@pytest.mark.parametrize(("n", "folds"), [(10, 5), (23, 5), (7, 7), (1000, 3)])
def test_folds_are_disjoint_and_cover_everything_once(n, folds):
    parts = [places(Split.fold_by_count(n, k, folds)) for k in range(1, folds + 1)]
    assert sorted(i for held, _ in parts for i in held) == list(range(n))
    for held, rest in parts:
        assert sorted(held + rest) == list(range(n))
        assert len(held) in (n // folds, -(-n // folds))


def test_a_share_is_the_beginning_of_the_order():
    held, rest = places(Split.by_count(30, 0.1))
    order = FeistelPermutation(30, 0, purpose="split")(np.arange(30)).tolist()
    assert (held, rest) == (order[:3], order[3:])
    assert places(Split.fold_by_count(30, 1, 10)) == (held, rest)


def test_a_fold_is_what_is_validated_on_and_the_rest_is_what_is_trained_on(tmp_path):
    source = Noise(23)
    number = {source.decode(i).tobytes(): i for i in range(23)}

    def numbers(stream):
        return [number[image.numpy().tobytes()] for batch in stream for image in batch.image]

    held = []
    for k in range(1, 6):
        data = opened(tmp_path, source, fold=k, folds=5, batch_size=7, seed=k)
        mine = numbers(data.val_dataloader())
        n = 23 - len(mine)
        epoch = numbers(batches(data, -(-n // 7)))[:n]
        assert sorted(mine + epoch) == list(range(23))
        assert data.names(np.arange(n)) == [f"noise {i}" for i in epoch]
        held += mine
    assert sorted(held) == list(range(23))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fold": 2}, "fold=2 folds=None: give both"),
        ({"folds": 5}, "fold=None folds=5: give both"),
        (
            {"fold": 6, "folds": 5},
            "fold=6 is none of folds=5: they are numbered from 1 to 5",
        ),
        ({"fold": 0, "folds": 5}, "fold=0 must be a whole number of at least 1"),
        ({"fold": 1, "folds": 1}, "folds=1 must be a whole number of at least 2"),
        ({"fold": 1.5, "folds": 3}, "fold=1.5"),
    ],
)
def test_nonsense_names_its_key(options, message):
    with pytest.raises(ValueError, match=message):
        ImageData(Noise(), image_size=8, **options)


def test_more_folds_than_images(tmp_path):
    with pytest.raises(ValueError, match=r"folds=6 cannot be made of 5 images"):
        opened(tmp_path, Noise(5), fold=1, folds=6)
