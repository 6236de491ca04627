"""Snapshots of the averages in real runs: under SIGKILL the same files, and pictures at any length
from them.
"""

import shutil
import signal
import subprocess
import sys

import pytest
import torch

from runs import ROOT, differences, kill_at, train
from sturdy.training.build import load_module
from sturdy.training.ema_snapshots import load

POWER = ["ema=power", "callbacks.snapshots.every_n_steps=5", "data.augment=0.3", "data.balance=0.5"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("whole")
    train(tmp, "whole", *POWER)
    return tmp


def files(run):
    return {path.name: load(path) for path in (run / "ema").iterdir()}


def equal(a, b):
    """Whether two snapshots are, bit for bit."""
    return (a["step"], a["stds"]) == (b["step"], b["stds"]) and all(
        x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)
        for x, y in zip([*a["averages"], a["buffers"]], [*b["averages"], b["buffers"]], strict=True)
    )


def test_they_are_the_averages_of_their_step(whole):
    found = files(whole / "runs" / "whole")
    assert sorted(found) == ["step-00000005.ckpt", "step-00000010.ckpt", "step-00000012.ckpt"]
    module = load_module(whole / "runs" / "whole" / "checkpoints" / "step-00000012" / "state.ckpt")
    for average, network in zip(
        found["step-00000012.ckpt"]["averages"], module.ema.networks(), strict=True
    ):
        assert all(torch.equal(average[name], p) for name, p in network.named_parameters())
    assert not equal(found["step-00000005.ckpt"], found["step-00000010.ckpt"])  # the control


@pytest.mark.slow
def test_killed_in_a_write_and_between_two_the_files_end_up_the_same(whole):
    """It dies before the snapshot of step 5 has its name, then after step 7: neither leaves half a
    file.
    """
    train(whole, "killed", *POWER, sabotage="die-in-snapshot", code=-signal.SIGKILL)
    assert [path.name for path in (whole / "runs" / "killed" / "ema").iterdir()] == [
        ".step-00000005.ckpt"
    ]
    kill_at(whole, "killed", 7, *POWER)
    train(whole, "killed", *POWER)
    expected, found = (files(whole / "runs" / name) for name in ("whole", "killed"))
    assert expected.keys() == found.keys()
    assert all(equal(expected[name], found[name]) for name in expected)
    assert differences(whole, "whole", "killed") == []


def test_a_branch_takes_its_later_snapshots_along(whole):
    run = whole / "runs" / "branch"
    shutil.copytree(whole / "runs" / "whole", run)
    train(
        whole, "branch", *POWER, f"ckpt_path={run}/checkpoints/step-00000009", "optimizer.lr=3e-3"
    )
    assert sorted(path.name for path in (run / "abandoned" / "001" / "ema").iterdir()) == [
        "step-00000010.ckpt",
        "step-00000012.ckpt",
    ]
    old, new = files(whole / "runs" / "whole"), files(run)
    assert old.keys() == new.keys()
    assert {name for name in old if not equal(old[name], new[name])} == {
        "step-00000010.ckpt",
        "step-00000012.ckpt",
    }


@pytest.mark.slow
def test_sampling_at_another_length(whole):
    def pictures(length):
        out = whole / f"pictures {length}"
        words = [
            sys.executable,
            str(ROOT / "sample.py"),
            "run=whole",
            f"paths.runs={whole / 'runs'}",
            "sample.n=2",
        ]
        words += ["sampler.steps=2", f"sample.ema={length}", f"sample.out='{out}'"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=300)
        return done, [path.read_bytes() for path in sorted(out.glob("0*.png"))]

    own, other = (pictures(length)[1] for length in ("null", 0.08))
    assert len(own) == len(other) == 2
    assert own != other
    done, _ = pictures(0.28)
    assert done.returncode == 2
    assert "an EMA of length 0.28 at step 12 cannot be put together" in done.stderr


def test_there_is_nothing_to_store_of_a_plain_average(tmp_path):
    done = train(tmp_path, "plain", *POWER[1:], code=2)
    assert "is for ema=power" in done.stderr
