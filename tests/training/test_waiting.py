"""How threads wait: the choice from recorded step times, the team that lets them sleep, and bits
that do not change.
"""

import itertools
import os
import subprocess
import sys
from typing import ClassVar

import pytest

from runs import ROOT, SMALL, differences, train
from sturdy.training.callbacks.thread_waiting import PolicyChooser, ThreadWaiting

TWO = [*SMALL, "trainer.threads=2", "data.image_size=32", "backbone.width=64"]


class Machine:
    """Seconds of a step, spinning and asleep: of ``experiment=cars``, images/s measured beside so
    many programs.
    """

    SECONDS: ClassVar = {0: (16 / 197, 16 / 140), 3: (16 / 16, 16 / 47), 7: (16 / 2, 16 / 23)}

    def __init__(self) -> None:
        self.chooser, self.lost, self.changes = PolicyChooser(), 0.0, 0
        self.noise = itertools.cycle([1.0, 1.08, 0.95, 1.02, 0.9, 1.05, 1.0])

    def run(self, seconds: float, busy: int) -> float:
        """Train for so long beside ``busy`` programs; return the speed; the better way all the time
        is 1.
        """
        spent = best = 0.0
        while spent < seconds:
            spinning, asleep = self.SECONDS[busy]
            step = asleep if self.chooser.asleep else min(spinning, self.chooser.limit() + asleep)
            step *= next(self.noise)
            spent += step
            best += min(self.SECONDS[busy])
            before = self.chooser.used
            self.chooser.observe(step)
            self.changes += self.chooser.used != before
        return best / spent


def test_alone_the_threads_spin():
    machine = Machine()
    assert machine.run(60, busy=0) > 0.97
    assert not machine.chooser.used
    assert machine.run(3600, busy=0) > 0.99
    assert machine.changes == 1


@pytest.mark.parametrize("gain", [1.1, 1.0, 0.95])
def test_alone_the_threads_spin_though_it_gains_little_or_nothing(gain):
    """By how much it is faster depends on the processor, and on the moment of the trial."""
    machine = Machine()
    machine.SECONDS = {0: (0.08, 0.08 * gain)}
    machine.run(60, busy=0)
    assert not machine.chooser.used
    assert machine.changes == 1


@pytest.mark.parametrize("busy", [3, 7])
def test_beside_other_programs_they_sleep_from_the_beginning(busy):
    machine = Machine()
    assert machine.run(1200, busy) > 0.9
    assert machine.chooser.used
    assert machine.changes == 0


@pytest.mark.parametrize("busy", [3, 7])
def test_they_sleep_while_others_come_and_go(busy):
    machine = Machine()
    for _ in range(3):
        assert machine.run(30, busy=0) > 0.8
        assert not machine.chooser.used
        assert machine.run(600, busy=0) > 0.99
        machine.run(60, busy)
        assert machine.chooser.used
        assert machine.run(600, busy) > 0.9
    assert machine.changes == 6


def test_a_slow_moment_changes_nothing():
    machine = Machine()
    machine.run(60, busy=0)
    assert not machine.chooser.used
    for _ in range(5):
        for _ in range(4):
            machine.chooser.observe(0.5)  # such as a save that takes the CPUs in the background
        machine.run(30, busy=0)
    assert machine.changes == 1


def test_a_slow_machine_is_not_a_busy_one():
    """Both ways are slower by the same factor: the trials stop changing anything, and become
    rare.
    """
    machine = Machine()
    machine.run(60, busy=0)
    trials = 0
    for _ in range(3000):
        trials += machine.chooser.asleep
        machine.chooser.observe(3 * machine.SECONDS[0][machine.chooser.asleep])
    assert not machine.chooser.used
    assert trials < 30


SWITCHES = """
import os, time, torch
from pathlib import Path
from sturdy.training.callbacks.thread_waiting import IdleTeam, gnu_openmp

torch.set_num_threads(2)

def tasks():
    return sorted(int(task.name) for task in Path("/proc/self/task").iterdir())

def slept():
    '''How often the second thread has gone to sleep in 50 loops.'''
    status = Path(f"/proc/self/task/{worker}/status")
    def count():
        voluntary, _ = status.read_text().split("nonvoluntary")
        return int(voluntary.split("voluntary_ctxt_switches:")[1])
    before = count()
    for _ in range(50):
        numbers.add_(1)
        time.sleep(0.002)
    return count() - before

known = tasks()
numbers = torch.zeros(1 << 17)
(worker,) = set(tasks()) - set(known)
spinning = slept()
team = IdleTeam(gnu_openmp(), 2)
asleep = slept()
team.close()
print(spinning, asleep, slept())
"""


def test_a_team_that_does_nothing_lets_the_others_sleep(monkeypatch):
    """With the policy ``active`` a thread spins for minutes before it sleeps, so that the counts
    are far apart.
    """
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    done = subprocess.run(
        [sys.executable, "-c", SWITCHES], capture_output=True, text=True, timeout=100
    )
    if "NoneType" in done.stderr:
        pytest.skip("torch does not compute with GNU's OpenMP here")
    before, asleep, after = map(int, done.stdout.split())
    assert max(before, after) <= 5
    assert asleep >= 40


class Restless(ThreadWaiting):
    """Changes the way at each step, and in the middle of those that spin."""

    def on_train_batch_start(self, trainer, *args):
        self.chooser.used = not self.chooser.used
        self.chooser.limit = lambda: 0.01
        super().on_train_batch_start(trainer, *args)
        print(f"team: {self.team is not None}")

    def on_train_batch_end(self, trainer, *args):
        self._stop_timer()


def test_the_way_of_waiting_changes_no_bit(tmp_path):
    train(tmp_path, "calm", "callbacks.waiting.policy=sleep", "trainer.max_steps=4", base=TWO)
    calm = train(tmp_path, "calm", "callbacks.waiting.policy=spin", base=TWO)
    assert "(bitwise" in calm.stdout
    restless = train(
        tmp_path, "restless", "callbacks.waiting._target_=training.test_waiting.Restless", base=TWO
    )
    assert "team" not in calm.stdout
    assert (restless.stdout.count("team: True"), restless.stdout.count("team: False")) == (6, 6)
    assert differences(tmp_path, "calm", "restless") == []


@pytest.mark.slow
def test_processes_change_the_way_together(tmp_path, monkeypatch):
    """Started and not forked: OpenMP hangs in the fork of a process that has used it."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"), prepend=os.pathsep)
    words = ["data.shards=4", "reduction=tree"]
    restless = "callbacks.waiting._target_=training.test_waiting.Restless"
    two = train(tmp_path, "two", *words, "trainer.devices=2", restless, base=TWO)
    train(tmp_path, "one", *words, base=TWO)
    assert (two.stdout.count("team: True"), two.stdout.count("team: False")) == (12, 12)
    assert differences(tmp_path, "one", "two") == []


def test_mistakes_are_told(tmp_path):
    assert (
        "callbacks.waiting.policy=slep must be one of"
        in train(tmp_path, "x", "callbacks.waiting.policy=slep", code=2).stderr
    )
