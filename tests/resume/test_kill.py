"""SIGKILL at any instant, the same command again: every weight, EMA, optimizer tensor and logged loss the same bits."""

import random

import pytest

from runs import SMALL, SMALL_DIT, differences, kill_at, train

CASES = {
    "unet": (SMALL, []),
    "dit": (SMALL_DIT, []),
    "shards and workers": (SMALL, ["data.shards=4", "data.num_workers=1"]),
}


@pytest.mark.parametrize("case", CASES)
def test_killed_three_times_ends_in_the_same_bits(case, tmp_path):
    base, overrides = CASES[case]
    train(tmp_path, "whole", *overrides, base=base)
    for step in sorted(random.Random(case).sample(range(2, 11), 3)):
        kill_at(tmp_path, "killed", step, *overrides, base=base)
    output = train(tmp_path, "killed", *overrides, base=base).stdout
    assert "bitwise: same stack" in output
    assert differences(tmp_path, "whole", "killed") == []


@pytest.mark.parametrize("control", ["seed=1", "data.shards=2"])
def test_control_another_trajectory_differs(control, tmp_path):
    """What the comparison must notice: other noise (seed), other reseeding of dropout and sums (shards)."""
    train(tmp_path, "whole")
    train(tmp_path, "other", control)
    assert any("state_dict" in name for name in differences(tmp_path, "whole", "other"))
