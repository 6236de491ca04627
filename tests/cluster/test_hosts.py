"""The hosts of the cluster tests are machines of their own, and leave nothing behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hosts import Cluster, Host

pytestmark = pytest.mark.cluster
LISTEN = "import socket; print(socket.create_server(('', 7000)).accept()[0].recv(1))"
KNOCK = "import socket, sys; socket.create_connection((sys.argv[1], 9), timeout=2)"
CONNECT = """
import socket, sys
connection = socket.create_connection(("h1", 7000), timeout=10)
print("connected", socket.gethostname(), flush=True)
connection.recv(1)
"""


def reaches(one: Host, other: Host) -> bool:
    """Return whether a packet from ``one`` to ``other`` is answered."""
    words = [
        sys.executable,
        "-c",
        "import socket, sys; socket.create_connection((sys.argv[1], 9), 2)",
    ]
    log = Path(str(one.cluster.names) + ".log")
    log.unlink(missing_ok=True)
    one.start([*words, other.address], log).wait()
    return "ConnectionRefusedError" in log.read_text()


def wait_for(text: str, log: Path) -> None:
    end = time.monotonic() + 60
    while text not in log.read_text():
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.02)


def test_power_and_cable(cluster: Cluster, tmp_path: Path) -> None:
    h1, h2 = cluster["h1"], cluster["h2"]
    assert h1.run(["hostname"]) == "h1\n"
    assert reaches(h1, h2)
    h2.unplug()
    assert not reaches(h1, h2)
    h2.plug()
    assert reaches(h1, h2)
    h2.power_off()
    assert not reaches(h1, h2)
    assert h2.pids("") == []
    h2.boot()
    assert reaches(h1, h2)
    h2.slow_down()
    assert reaches(h1, h2)
    h2.drop_packets(1)
    assert not reaches(h1, h2)


def test_a_host_without_power_says_no_last_word(cluster: Cluster, tmp_path: Path) -> None:
    """A killed process closes its connection; that of a host without power stays open."""
    h1, h2 = cluster["h1"], cluster["h2"]
    logs = {}
    for stop in ("kill", "power"):
        listener = h1.start([sys.executable, "-c", LISTEN], tmp_path / f"listen-{stop}.out")
        while not h1.pids("7000"):
            time.sleep(0.02)
        time.sleep(1)
        logs[stop] = tmp_path / f"connect-{stop}.out"
        h2.start([sys.executable, "-c", CONNECT], logs[stop])
        wait_for("connected h2", logs[stop])
        if stop == "kill":
            (pid,) = h2.pids("7000")
            os.kill(pid, signal.SIGKILL)
            assert listener.wait(timeout=20) == 0  # it reads the end
        else:
            h2.power_off()
            with pytest.raises(subprocess.TimeoutExpired):
                listener.wait(timeout=3)


def test_a_killed_test_leaves_no_host(tmp_path: Path) -> None:
    script = """
import sys, time
from pathlib import Path
from hosts import Cluster
cluster = Cluster(Path(sys.argv[1]))
cluster["h1"].start(["sleep", "4321"], Path(sys.argv[1]) / "log")
print(*(host.init for host in cluster.hosts.values()), cluster.switch.pid, flush=True)
time.sleep(600)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    words = [sys.executable, "-c", script, str(tmp_path)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout
    pids = process.stdout.readline().split()
    process.kill()
    process.wait()
    end = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < end
        time.sleep(0.05)
