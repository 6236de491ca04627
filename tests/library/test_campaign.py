"""SIGKILL everywhere in the life of a store, and at random in real runs: nothing is lost, and the
bits come out.
"""

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from campaign import SCENES, Scene, state_at, trials
from campaign_kills import FORK, ByLine, BySystemCall

from exact_resume.checkpoint.store import Store
from runs import command, differences, train


def pairs(points, n, seed):
    """Trials of two kills in a row: the first at ``n`` points spread over all (None: at each), the
    second anywhere.
    """
    rng = random.Random(seed)
    first = points if n is None else points[rng.randrange(len(points) // n) :: len(points) // n]
    return ([point, rng.choice(points)] for point in first)


@pytest.mark.parametrize("scene", SCENES)
def test_killed_twice_at_lines_all_over_a_life(scene, tmp_path):
    kills = trials(tmp_path, SCENES[scene], ByLine(), lambda points: pairs(points, 6, scene))
    assert kills >= 8


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
@pytest.mark.parametrize("scene", SCENES)
def test_killed_at_every_system_call_that_touches_the_store(scene, tmp_path, capsys):
    start = time.monotonic()
    kills = trials(
        tmp_path, SCENES[scene], BySystemCall(), lambda points: pairs(points, None, scene)
    )
    assert kills >= 200
    with capsys.disabled():
        print(f"\n{scene}: {kills} kills in {time.monotonic() - start:.0f} s")


def commit_by_copying(self, step, state, commit=Store.commit):
    aside = Store(self.directory.parent / "aside")
    shutil.rmtree(aside.directory, ignore_errors=True)
    shutil.copytree(commit(aside, step, state), self.path(step))


def prune_in_place(self, keep):
    for step in self.steps()[:-1]:
        if step not in keep:
            shutil.rmtree(self.path(step))


def prune_too_much(self, keep):
    shutil.rmtree(self.directory)


@pytest.mark.parametrize("wrong", [commit_by_copying, prune_in_place, prune_too_much])
def test_control_a_careless_store_is_noticed(wrong, tmp_path, monkeypatch):
    monkeypatch.setattr(Store, wrong.__name__.split("_")[0], wrong)
    monkeypatch.setattr(ByLine, "files", (shutil.__file__, __file__))
    with pytest.raises(AssertionError, match=r"not whole|was committed|not there"):
        trials(tmp_path, Scene((2, 4)), ByLine(), lambda points: pairs(points, 40, wrong.__name__))


def look_without_permission(directory, answer):
    os.chdir(directory)
    if os.geteuid() == 0:
        os.seteuid(65534)
    try:
        answer.send(Store(Path("checkpoints")).last(quarantine=True))
    except Exception as error:
        answer.send(error)


def test_whoever_may_not_read_a_checkpoint_does_not_put_it_into_quarantine(tmp_path):
    store = Store(tmp_path / "checkpoints")
    store.commit(2, state_at(2))
    store.state(2).chmod(0)
    for directory in (tmp_path, store.directory, store.path(2)):
        directory.chmod(0o777)
    ours, theirs = FORK.Pipe()
    child = FORK.Process(target=look_without_permission, args=(tmp_path, theirs))
    child.start()
    assert isinstance(ours.recv(), PermissionError)
    child.join()
    store.state(2).chmod(0o600)
    assert store.last()["step"] == 2


STEPS = [
    "trainer.max_steps=40",
    "trainer.val_check_interval=8",
    "callbacks.samples.every_n_steps=10",
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A directory with the undisturbed run ``whole``, and how many seconds it took."""
    tmp, start = tmp_path_factory.mktemp("real"), time.monotonic()
    train(tmp, "whole", *STEPS)
    return tmp, time.monotonic() - start


def kill(process: subprocess.Popen[bytes], when: Callable[[], bool]) -> bool:
    """SIGKILL as soon as ``when`` says so; False if the process ended before."""
    while process.poll() is None and not when():
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def recorded(metrics: Path) -> int:
    """The newest step in ``metrics.csv``."""
    lines = metrics.read_text().split("\n")[1:-1] if metrics.exists() else []
    return max((int(line.split(",")[0]) for line in lines), default=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_real_runs_killed_at_random_end_in_the_same_bits(seed, undisturbed, capsys):
    """By turns after a recorded step, and at any instant from the first import on; also before any
    progress.
    """
    (tmp, seconds), rng, name, found = undisturbed, random.Random(seed), f"killed-{seed}", []
    for number in range(4):
        step, start = 9 * number + rng.randrange(1, 10), time.monotonic()
        instant = start + rng.uniform(0, seconds)
        with subprocess.Popen(
            command(tmp, name, *STEPS), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as run:
            if number % 2:
                killed = kill(run, lambda instant=instant: time.monotonic() > instant)
            else:
                killed = kill(
                    run, lambda step=step: recorded(tmp / "runs" / name / "metrics.csv") >= step
                )
        found += (
            [max(Store(tmp / "runs" / name / "checkpoints").steps(), default=0)] if killed else []
        )
    train(tmp, name, *STEPS)
    with capsys.disabled():
        print(f"\nseed {seed}: {len(found)} kills, with checkpoints up to step {found}")
    assert found
    assert differences(tmp, "whole", name) == []
