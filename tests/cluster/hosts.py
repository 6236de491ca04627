"""Machines that can lose their power or their cable, on one computer (Linux, as root).

A host is a set of namespaces: network, hostname, mounts and processes. The hosts share a switch,
which is a bridge in a network namespace of its own, and all files but ``/proc`` and ``/etc/hosts``.

None of it has a name outside: two clusters do not meet, and nothing is left when the process that
made them ends, however it ends.

    with Cluster(tmp_path) as cluster:
        h1, h2 = cluster["h1"], cluster["h2"]
        process = h1.start(["ping", h2.address], tmp_path / "h1.out")
        h2.power_off()
        h2.boot()
"""

import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

NETWORK = "10.77.0"
# The kernel kills what is started with this when the thread that started it ends.
DIE_WITH_PARENT = ["setpriv", "--pdeathsig", "KILL", "--"]
TOOLS = ("ip", "iptables", "nsenter", "setpriv", "tc", "unshare")


class Cluster:
    """Hosts on one switch; they run from the start.

    Attributes:
        hosts: by name. ``cluster["h1"]`` is short for ``cluster.hosts["h1"]``.
    """

    def __init__(self, folder: Path, names: Sequence[str] = ("h1", "h2", "h3")) -> None:
        """Boot the hosts.

        Args:
            folder: Where the hosts' ``/etc/hosts`` is written.
            names: The hostnames; the first has the address 10.77.0.1, and so on.
        """
        self.hosts: dict[str, Host] = {}
        command = "ip link add switch type bridge && ip link set switch up"
        self.switch = start_namespaces(["--net"], command)
        self.names = folder / "etc-hosts"
        addresses = {name: f"{NETWORK}.{number}" for number, name in enumerate(names, 1)}
        lines = [f"{address} {name}\n" for name, address in addresses.items()]
        self.names.write_text("127.0.0.1 localhost\n" + "".join(lines))
        try:
            for name, address in addresses.items():
                self.hosts[name] = Host(self, name, address)
                self.hosts[name].boot()
        except BaseException:
            self.close()
            raise

    def __getitem__(self, name: str) -> "Host":
        return self.hosts[name]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Switch all hosts off, and take the network away."""
        for host in self.hosts.values():
            host.power_off()
        end(self.switch)

    def run_on_switch(self, *command: str) -> None:
        """Run ``command`` in the network namespace of the switch."""
        check(["nsenter", f"--target={self.switch.pid}", "--net", "--", *command])


class Host:
    """A machine. Its processes and its connections are gone after ``power_off``.

    Attributes:
        name: its hostname.
        address: on the switch, such as 10.77.0.1.
        init: the process id of its first process, as seen from outside; None while it is off.
    """

    def __init__(self, cluster: Cluster, name: str, address: str) -> None:
        self.cluster = cluster
        self.name = name
        self.address = address
        self.port = f"to-{name}"  # its interface on the switch
        self.holder: subprocess.Popen[str] | None = None
        self.init: int | None = None

    def boot(self) -> None:
        """Switch the host on, with nothing running on it."""
        assert self.init is None, f"{self.name} is on"
        kinds = ["--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        command = f"hostname {self.name} && mount --bind {self.cluster.names} /etc/hosts"
        self.holder = start_namespaces(kinds, f"{command} && ip link set lo up")
        (self.init,) = children(self.holder.pid)
        last = int(self.address.rpartition(".")[2])
        # The same hardware address at every boot, so that the others find it again.
        card = ["address", f"02:00:00:00:00:{last:02x}"]
        pair = ["ip", "link", "add", self.port, "type", "veth", "peer", "name", "eth0", *card]
        self.cluster.run_on_switch(*pair, "netns", str(self.init))
        self.cluster.run_on_switch("ip", "link", "set", self.port, "master", "switch", "up")
        self.run(["ip", "address", "add", f"{self.address}/24", "dev", "eth0"])
        self.run(["ip", "link", "set", "eth0", "up"])

    def power_off(self) -> None:
        """Cut the power: nothing on the host can say a last word to the others."""
        if self.holder is None or self.init is None:
            return
        self.unplug()  # first, since the kernel closes the connections of a killed process
        os.kill(self.init, signal.SIGKILL)
        self.init = None
        end(self.holder)
        with suppress(AssertionError):  # it may have gone with the host
            self.cluster.run_on_switch("ip", "link", "delete", self.port)

    def unplug(self) -> None:
        """Pull the cable out: packets to and from the host are lost."""
        self.cluster.run_on_switch("ip", "link", "set", self.port, "down")

    def plug(self) -> None:
        """Put the cable back."""
        self.cluster.run_on_switch("ip", "link", "set", self.port, "up")

    def slow_down(self, rate: str = "4mbit") -> None:
        """Let no more than ``rate`` (as ``tc`` writes it) through to the host, until it is off."""
        limit = ["tbf", "rate", rate, "burst", "16kbit", "latency", "200ms"]
        self.cluster.run_on_switch("tc", "qdisc", "add", "dev", self.port, "root", *limit)

    def drop_packets(self, probability: float) -> None:
        """Lose each packet to the host with ``probability``; until it is off."""
        chance = ["-m", "statistic", "--mode", "random", "--probability", str(probability)]
        self.run(["iptables", "-A", "INPUT", "-i", "eth0", *chance, "-j", "DROP"])

    def start(
        self, command: Sequence[str], log: Path, cwd: Path | None = None, **environment: str
    ) -> subprocess.Popen[bytes]:
        """Start ``command`` on the host.

        Args:
            command: The program and its arguments.
            log: Its output and its errors are added to this file.
            cwd: Where it starts; None for the current directory.
            environment: Variables that it gets beside those of this process.

        Returns:
            A process that has the exit code of ``command``. To kill ``command`` itself, see
            ``pids``.
        """
        with log.open("a") as output:
            return subprocess.Popen(
                self._enter(command, cwd),
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def run(self, command: Sequence[str], cwd: Path | None = None) -> str:
        """Return what ``command`` prints on the host; it must end with 0."""
        return check(self._enter(command, cwd))

    def pids(self, word: str) -> list[int]:
        """Return the processes of the host with ``word`` in an argument, as seen from outside.

        The oldest comes first.
        """
        if self.init is None:
            return []
        here = os.readlink(f"/proc/{self.init}/ns/pid")
        found = []
        for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if os.readlink(f"/proc/{pid}/ns/pid") == here:
                    if any(word.encode() in argument for argument in words):
                        found.append(pid)
            except OSError:  # it has ended
                continue
        return found

    def _enter(self, command: Sequence[str], cwd: Path | None) -> list[str]:
        assert self.init is not None, f"{self.name} is off"
        kinds = ["--uts", "--mount", "--net", "--pid"]
        # The mount namespace has its own current directory.
        there = ["env", f"--chdir={cwd or Path.cwd()}"]
        return ["nsenter", f"--target={self.init}", *kinds, "--", *there, *command]


def why_impossible(folder: Path) -> str:
    """Return why no hosts can be made here, or nothing if they can."""
    if not hasattr(os, "geteuid") or os.geteuid():
        return "hosts are namespaces, which only root on Linux can make"
    if missing := [tool for tool in TOOLS if not shutil.which(tool)]:
        return f"not installed: {', '.join(missing)} (Debian: iproute2 iptables util-linux)"
    try:
        with Cluster(folder, ["h1"]):
            return ""
    except AssertionError as error:  # in a container, even root may not
        return f"no hosts on this machine: {error}"


def start_namespaces(kinds: Sequence[str], command: str) -> "subprocess.Popen[str]":
    """Return a process that holds new namespaces, in which ``command`` of the shell was run."""
    script = f"{command} && echo ready && exec sleep infinity"
    process = subprocess.Popen(
        [*DIE_WITH_PARENT, "unshare", *kinds, "--", "sh", "-c", script],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout
    said = process.stdout.readline()
    if said != "ready\n":
        end(process)
        raise AssertionError(f"{command}: {said}{process.stdout.read()}")
    return process


def end(process: "subprocess.Popen[str]") -> None:
    """Kill ``process``, and wait until it is gone."""
    process.kill()
    process.wait()


def children(pid: int) -> list[int]:
    """Return the process ids of the children of ``pid`` that live now."""
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for child in " ".join(c.read_text() for c in lists).split()]


def check(command: Sequence[str]) -> str:
    """Return what ``command`` prints; it must end with 0."""
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
    return done.stdout
