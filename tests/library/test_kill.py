"""SIGKILL at any instant, the same command again: every weight, EMA, optimizer tensor and logged
loss the same bits.

The small runs have dropout, class conditioning and 48 training images in batches of 8: an epoch
    ends at step 6.
"""

import random
import signal
from pathlib import Path

import pytest

from runs import SMALL, SMALL_UNET, differences, kill_at, train

CASES = {
    "unet in shards": (SMALL_UNET, ["data.shards=4"], 2),
    "dit with workers": (
        SMALL,
        ["data.batch_size=10", "data.num_workers=2"],
        1,
    ),  # a batch spans two epochs
}


@pytest.mark.parametrize("case", CASES)
def test_killed_it_ends_in_the_same_bits(case, tmp_path):
    base, overrides, kills = CASES[case]
    train(tmp_path, "whole", *overrides, base=base)
    rng = random.Random(case)
    for step in sorted(rng.sample([2, 4, 6, 8], kills)):
        kill_at(tmp_path, "killed", step, *overrides, base=base, after=rng.uniform(0, 0.03))
    output = train(tmp_path, "killed", *overrides, base=base).stdout
    assert "bitwise: same stack" in output
    assert differences(tmp_path, "whole", "killed") == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A directory with the undisturbed run ``whole``."""
    tmp = tmp_path_factory.mktemp("whole")
    train(tmp, "whole")
    return tmp


def test_killed_in_a_save_a_validation_and_a_grid_of_samples(whole):
    """In the save of step 3, then in the validation of step 4, then in the grid of step 6: nothing
    is missing.
    """
    for place in ("save", "validation", "samples"):
        train(whole, "places", sabotage=f"die-in-{place}", code=-signal.SIGKILL)
    assert "bitwise: same stack" in train(whole, "places").stdout
    assert differences(whole, "whole", "places") == []
    expected, found = (pictures(whole / "runs" / run / "samples") for run in ("whole", "places"))
    assert sorted(expected) == ["step-00000006.png", "step-00000012.png"]
    assert found == expected


def pictures(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize(
    "mechanism", ["order", *(pytest.param(m, marks=pytest.mark.slow) for m in ("noise", "dropout"))]
)
def test_control_without_the_mechanism_a_kill_is_noticed(mechanism, whole):
    undisturbed, killed = f"{mechanism}-undisturbed", f"{mechanism}-killed"
    train(whole, undisturbed, sabotage=mechanism)
    kill_at(whole, killed, 8, sabotage=mechanism, saved=True)
    train(whole, killed, sabotage=mechanism)
    odd = differences(whole, undisturbed, killed)
    assert any("state_dict" in name for name in odd)
    assert any(name.startswith("row") for name in odd)


def test_control_other_shards_change_the_bits(whole):
    train(whole, "shards", "data.shards=2")
    assert any("state_dict" in name for name in differences(whole, "whole", "shards"))
