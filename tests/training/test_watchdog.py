"""Real fits that hang, are slow, and are well, under the watchdog."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sturdy.training.callbacks.watchdog import Watchdog

WATCHED = Path(__file__).with_name("watched.py")
FILE = "attempts/001/hang-rank0.txt"


def watched(directory, how):
    words = [sys.executable, str(WATCHED), str(directory), how]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(words, capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.parametrize(
    ("how", "first"),
    [
        ("step", "Watched: step 4, at most 2 s. "),
        pytest.param("validation", "Watched: the validation of step 3, at most 2 s. ", marks=pytest.mark.slow),
    ],
)
def test_a_hang_that_holds_the_interpreter_lock_is_ended_and_told(tmp_path, how, first):
    done = watched(tmp_path, how)
    assert (done.returncode, "lived" in done.stdout) == (1, False), done.stderr
    lines = (tmp_path / FILE).read_text().splitlines()
    assert lines[0].startswith(first)
    assert lines[1].startswith("Timeout")
    assert any("watched.py" in line and "in hang" in line for line in lines)


@pytest.mark.slow
def test_what_is_slow_lives(tmp_path):
    """Steps, validations and what follows a step; nothing is left of it. After an error nothing is watched."""
    done = watched(tmp_path, "well")
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["lived"]), done.stderr
    assert "Timeout" not in done.stderr
    left = [p for p in tmp_path.rglob("hang-*")]
    assert left == [tmp_path / "usr" / FILE], "only the stacks that were asked for"
    assert "in fourth" in left[0].read_text()


def test_the_limit_is_relative_to_the_usual():
    watchdog = Watchdog(factor=20, at_least=60, start=1800)
    assert watchdog.limit() == 1800
    watchdog.times.extend([1, 1, 300, 1])
    assert watchdog.limit() == 60
    watchdog.times.extend([10] * 50)
    assert watchdog.limit() == 200


def test_only_files_of_hangs_are_kept(tmp_path):
    watchdog = Watchdog()
    for attempt, text in {"001": "x" * 160, "002": "x" * 161}.items():
        (tmp_path / attempt).mkdir()
        (tmp_path / attempt / "hang-rank0.txt").write_text(text)
        (tmp_path / attempt / "hang-rank1.txt").write_text(text)
    (tmp_path / "003").mkdir()
    watchdog._open(tmp_path / "003" / "hang-rank0.txt")
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.glob("*/*rank0*")) == [
        "002/hang-rank0.txt",
        "003/hang-rank0.txt",
    ]
    assert len(list(tmp_path.glob("*/*rank1*"))) == 2, "another process looks after its own"


@pytest.mark.parametrize("name", ["factor", "at_least", "start", "pause"])
def test_a_limit_of_nothing_is_refused(name):
    with pytest.raises(ValueError, match=f"callbacks.watchdog.{name}=0"):
        Watchdog(**{name: 0})
