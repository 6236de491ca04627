"""Three hosts train one run under torchrun, and lose processes, cables and machines."""

import os
import time
from functools import partial
from pathlib import Path

import pytest
from host_training import Training
from hosts import Cluster, Host

pytestmark = pytest.mark.cluster
TIMES = int(os.environ.get("CLUSTER_TIMES", "5"))  # how often each fault strikes
FEW = (TIMES + 1) // 2  # the slow ones


def test_killed_processes(cluster: Cluster, tmp_path: Path) -> None:
    """Only its own torchrun counts that as a restart."""
    h1, h2 = cluster["h1"], cluster["h2"]
    run = Training(cluster, tmp_path, "killed")
    run.start(h1, h2)
    for number in range(TIMES):
        for host in (h1, h2):
            run.train_on(40 + 10 * number)
            kill = partial(run.kill_rank, host)
            run.strike("a process killed", kill, processes=2)
    for number in range(TIMES):
        for host, which in ((h1, "on HOST"), (h2, "elsewhere")):
            run.train_on(40 + 10 * number)
            kill = partial(run.kill_torchrun, host)
            run.strike(f"a torchrun killed, {which}", kill, processes=2)
    run.finish(h1, h2)


def test_without_a_common_name_of_a_start_the_processes_do_not_meet(
    cluster: Cluster, tmp_path: Path
) -> None:
    """The control of the test before."""
    h1, h2 = cluster["h1"], cluster["h2"]
    run = Training(cluster, tmp_path, "counted", sabotage="count-restarts")
    run.start(h1, h2)
    run.train_on(40)
    with pytest.raises(AssertionError, match="not within 150 s"):
        run.strike("a process killed", partial(run.kill_rank, h2), patience=150)
    assert len(run.starts()) == 1
    assert run.rank(h1)  # they wait for each other
    assert run.rank(h2)


def test_lost_machines(cluster: Cluster, tmp_path: Path) -> None:
    """The others go on, and take it in again."""
    h1, h2 = cluster["h1"], cluster["h2"]
    run = Training(cluster, tmp_path, "lost")
    run.start(h1, h2)

    def come_back() -> None:
        h2.boot()
        run.start(h2)

    for number in range(TIMES):
        run.train_on(40 + 10 * number)
        run.strike("a machine lost", h2.power_off, processes=1)
        run.train_on()
        run.strike("the machine is back", come_back, processes=2)
    run.finish(h1, h2)


def test_cables(cluster: Cluster, tmp_path: Path) -> None:
    """A short cut is waited for, and after a long one the machines meet again."""
    h1, h2 = cluster["h1"], cluster["h2"]
    run = Training(cluster, tmp_path, "cables")
    run.start(h1, h2)

    def cut(seconds: float) -> None:
        h2.unplug()
        time.sleep(seconds)
        h2.plug()

    for number in range(FEW):
        run.train_on(40 + 10 * number)
        starts = run.starts()
        run.strike("a cable out for 20 s", lambda: cut(20))
        assert run.starts() == starts
        run.train_on()
        run.strike("a cable out for 130 s", lambda: cut(130), processes=2)
    run.finish(h1, h2)


def test_the_machine_where_they_meet_is_lost(cluster: Cluster, tmp_path: Path) -> None:
    """Without it the other one waits."""
    h1, h2 = cluster["h1"], cluster["h2"]
    run = Training(cluster, tmp_path, "meeting")
    run.start(h1, h2)

    def lose(away: int) -> None:
        h1.power_off()
        time.sleep(away)
        h1.boot()
        run.start(h1)

    for number in range(FEW):
        away = 10 + 80 * number  # seconds
        run.train_on(40 + 10 * number)
        run.strike(f"HOST lost, and back after {away} s", partial(lose, away), processes=2)
    run.finish(h1, h2)


def test_four_shards_and_three_machines(cluster: Cluster, tmp_path: Path) -> None:
    """Two of them train, whichever there are, and the third one stands by."""
    h1, h2, h3 = cluster.hosts.values()
    run = Training(cluster, tmp_path, "three")
    run.start(h1)
    run.train_on(40)

    def come_back(host: Host) -> None:
        host.boot()
        run.start(host)

    run.strike("a second machine joins", partial(run.start, h2), processes=2)
    run.train_on(40)
    run.strike("a third machine joins, to stand by", partial(run.start, h3), processes=2)
    assert "1 stands by" in run.last_start().banner
    run.train_on()
    run.strike("a machine lost, of three", h2.power_off, processes=2)
    assert "stands by" not in run.last_start().banner
    run.train_on()
    run.strike("the machine is back, of three", partial(come_back, h2), processes=2)
    assert "1 stands by" in run.last_start().banner
    run.train_on()
    run.strike("a machine lost that stood by", h3.power_off)
    run.train_on()
    run.strike("a second machine lost, of three", h2.power_off, processes=1)
    run.train_on()
    run.finish(h1, h2)


def test_a_chosen_checkpoint_is_entered_once(cluster: Cluster, tmp_path: Path) -> None:
    """Not again when a machine joins: that would throw away what was trained since."""
    h1, h2 = cluster["h1"], cluster["h2"]
    run = Training(cluster, tmp_path, "chosen")
    run.start(h1)
    run.train_on(60)
    h1.power_off()
    chosen = run.store.steps()[0]
    word = f"ckpt_path={run.store.path(chosen)}"
    h1.boot()
    run.start(h1, words=(word,))
    run.until(lambda: len(run.starts()) == 2, "it trains")
    run.train_on(100)
    run.strike("a machine joins", partial(run.start, h2, words=(word,)), processes=2)
    run.train_on(40)
    run.strike("a process killed", partial(run.kill_rank, h1), processes=2)
    first, entered, *later = [start.step for start in run.starts().values()]
    assert (first, entered) == (0, chosen)
    assert min(later) >= chosen + 80
    assert len(list(run.home.glob("abandoned/*"))) == 1
    run.finish(h1, h2)


def test_a_silent_machine_is_noticed_in_a_minute(cluster: Cluster, tmp_path: Path) -> None:
    """Wherever the others wait for it."""
    h1, h2 = cluster["h1"], cluster["h2"]
    run = Training(cluster, tmp_path, "silent", sabotage="linger")
    run.start(h1, h2)
    for place in ("agreement", "step", "validation"):
        run.train_on(40)
        (tmp_path / place).touch()
        run.until((tmp_path / f"{place}.here").exists, f"it waits in: {place}")
        waiting = Path(f"/proc/{run.rank(h1)}")

        def lose(waiting: Path = waiting, place: str = place) -> None:
            h2.power_off()
            run.until(lambda: not waiting.exists(), f"it is noticed in: {place}", patience=90)

        run.strike(f"a machine lost, in: {place}", lose, processes=1)
        h2.boot()
        run.start(h2)
        run.until(lambda: run.last_start().processes == 2, "both train")
    run.finish(h1, h2)


def test_stopped_by_hand(cluster: Cluster, tmp_path: Path) -> None:
    """Ctrl-C, on one machine and then on the other: each time the run has saved."""
    h1, h2 = cluster["h1"], cluster["h2"]
    run = Training(cluster, tmp_path, "stopped")
    run.start(h1, h2)
    run.train_on(40)
    run.strike("Ctrl-C on a machine", partial(run.interrupt, h2), processes=1)
    run.train_on()
    run.interrupt(h1)
    for host in (h1, h2):
        run.until(lambda h=host: run.loops[h.name].poll() is not None, f"{host.name} has stopped")
    assert run.store.steps()[-1] == run.last_step()
    run.finish(h1, h2)
