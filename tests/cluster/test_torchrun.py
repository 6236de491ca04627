"""Three hosts train one run under torchrun, and lose processes, cables and machines."""

import os
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
