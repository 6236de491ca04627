"""Three hosts train one run under torchrun, and lose processes, cables and machines."""

import os
import time
from pathlib import Path

import pytest
from hosts import Cluster

from training import Training

pytestmark = pytest.mark.cluster
TIMES = int(os.environ.get("CLUSTER_TIMES", "2"))  # of each fault; 10 for the table of the docs


def test_killed_processes(cluster: Cluster, tmp_path: Path) -> None:
    """Only its own torchrun counts that as a restart."""
    h1, h2 = cluster["h1"], cluster["h2"]
    run = Training(cluster, tmp_path, "killed")
    run.start(h1, h2)
    for number in range(TIMES):
        for host in (h1, h2):
            run.train_on(40 + 10 * number)
            run.strike("a process killed", lambda host=host: run.kill_rank(host))
    run.finish(h1, h2)


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
        run.strike("a machine lost", h2.power_off)
        run.train_on()
        run.strike("the machine is back", come_back)
    run.finish(h1, h2)


def test_cables(cluster: Cluster, tmp_path: Path) -> None:
    h1, h2 = cluster["h1"], cluster["h2"]
    run = Training(cluster, tmp_path, "cables")
    run.start(h1, h2)

    def cut(seconds: float) -> None:
        h2.unplug()
        time.sleep(seconds)
        h2.plug()

    for number in range(TIMES):
        run.train_on(40 + 10 * number)
        attempts = run.resumed_from()
        run.strike("a cable out for 20 s", lambda: cut(20))
        assert run.resumed_from() == attempts  # it has waited
        run.train_on()
        run.strike("a cable out for 130 s", lambda: cut(130))
        run.until(lambda: "2 processes" in run.last_start(), "the machine is back")
    run.finish(h1, h2)


def test_the_machine_where_they_meet_is_lost(cluster: Cluster, tmp_path: Path) -> None:
    h1, h2 = cluster["h1"], cluster["h2"]
    run = Training(cluster, tmp_path, "meeting")
    run.start(h1, h2)

    def lose() -> None:
        h1.power_off()
        time.sleep(10)
        h1.boot()
        run.start(h1)

    for number in range(TIMES):
        run.train_on(40 + 10 * number)
        run.strike("HOST lost, and back after 10 s", lose)
        run.until(lambda: "2 processes" in run.last_start(), "both train")
    run.finish(h1, h2)
