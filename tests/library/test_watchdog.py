"""Real fits that hang, are slow, and are well, under the watchdog."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from exact_resume.callbacks.watchdog import Watchdog
from worlds import World

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
        pytest.param(
            "validation", "Watched: the validation of step 3, at most 2 s. ", marks=pytest.mark.slow
        ),
    ],
)
def test_a_hang_that_holds_the_interpreter_lock_is_ended_and_told(tmp_path, how, first):
    done = watched(tmp_path, how)
    assert (done.returncode, "lived" in done.stdout) == (1, False), done.stderr
    lines = (tmp_path / FILE).read_text().splitlines()
    assert lines[0].startswith(first)
    assert lines[1].startswith("Timeout")
    assert any("watched.py" in line and "in hang" in line for line in lines)


def test_a_peer_that_falls_silent_between_two_steps_is_waited_for_no_longer_than_for_a_step(
    tmp_path,
):
    """It has added its gradients to those of the others, and is then stopped: as if its machine had
    lost power.
    """

    def fall_silent(rank):
        from sturdy.training.module import DiffusionModule

        training_step = DiffusionModule.training_step

        def silent(self, *args):
            outputs = training_step(self, *args)
            if rank and self.global_step == 6:
                os.kill(os.getpid(), signal.SIGSTOP)
            return outputs

        DiffusionModule.training_step = silent

    limits = (
        "callbacks.watchdog.at_least=5",
        "callbacks.watchdog.factor=0.01",
        "callbacks.watchdog.pause=1800",
    )
    world = World(tmp_path, "run", 2, *limits, first=fall_silent)
    end = time.monotonic() + 200
    while (
        os.waitid(os.P_PID, world.pids[0], os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        and time.monotonic() < end
    ):
        time.sleep(0.1)
    world.kill()
    codes = world.wait()
    said = (tmp_path / "runs" / "run" / FILE).read_text()
    assert said.startswith("Watched: step 6, at most 5 s.")
    assert "in all_reduce_max" in said
    assert codes == [1, -signal.SIGKILL]


@pytest.mark.slow
def test_what_is_slow_lives(tmp_path):
    """Steps, validations and what follows a step; nothing is left of it. After an error nothing is
    watched.
    """
    done = watched(tmp_path, "well")
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["lived"]), done.stderr
    assert "Timeout" not in done.stderr
    left = sorted(tmp_path.rglob("hang-*"))
    assert left == [tmp_path / "unarmed usr" / FILE, tmp_path / "usr" / FILE], (
        "only the stacks that were asked for"
    )
    assert all("in fourth" in file.read_text() for file in left)


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
    with pytest.raises(ValueError, match=f"^{name}=0"):
        Watchdog(**{name: 0})
