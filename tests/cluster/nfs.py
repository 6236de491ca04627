"""A file server and its clients: NFS 4.2 between real Linux kernels, on one computer.

One kernel would be server and client at once, and could not crash alone. So each machine is a host
of hosts.py on which a kernel of its own runs, as a process: User Mode Linux. Its files are those of
this computer, but for ``share``: there the clients see the server's disk, which is an image in the
test's folder.

Debian 12 has all that is needed:

    apt-get install user-mode-linux nfs-kernel-server nfs-common kmod e2fsprogs gcc libc6-dev

    with Cluster(folder) as cluster:
        nfs = NFS(cluster, folder)
        job = nfs["h2"].start(script, str(nfs.share / "file"))
        nfs["h2"].unplug()
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from hosts import Cluster, Host, check

HERE = Path(__file__).parent
NETWORK = "10.78.0"  # not that of the hosts, whose own kernel must not answer
KERNEL = "linux.uml"
TOOLS = (KERNEL, "cc", "exportfs", "mkfs.ext4", "modprobe", "mount.nfs4", "rpc.mountd", "rpc.nfsd")
MODULES = Path("/usr/lib/uml/modules")
PATIENCE = 300.0  # seconds until a machine has booted, or a job has done its work


class NFS:
    """A server on the first host of ``cluster``, and clients on the others; all are on.

    Attributes:
        share: the folder that the machines share. Here it is empty.
        machines: by the name of the host. ``nfs["h1"]`` is short for ``nfs.machines["h1"]``.
    """

    def __init__(self, cluster: Cluster, folder: Path, lease: int = 90) -> None:
        """Boot the machines.

        Args:
            cluster: hosts on which nothing runs.
            folder: where the disk and the messages are written.
            lease: seconds in which a client must be heard for its locks to stay; 90 is what Linux
                has. After its boot the server gives no new lock for as long.
        """
        self.cluster = cluster
        self.share = folder / "share"
        self.share.mkdir()
        image = folder / "disk.img"
        with image.open("wb") as file:
            file.truncate(300 << 20)
        check(["mkfs.ext4", "-q", str(image)])
        modules = folder / "modules" / "lib"
        modules.mkdir(parents=True)
        (modules / "modules").symlink_to(MODULES)
        server, *clients = cluster.hosts.values()
        settings = {
            "AGENT": HERE / "nfs_agent.py",
            "LEASE": lease,
            "MODULES": modules.parent,
            "PRELOAD": wide_registers(folder),
            "PYTHON": sys.executable,
            "PYTHONPATH": f"{HERE.parents[1] / 'src'}:{HERE.parent}:{HERE}",
            "SERVER": f"{NETWORK}.1",
            "SHARE": self.share,
        }
        self.server = Machine(server, folder, settings | {"ROLE": "server"}, disk=image)
        self.machines = {server.name: self.server}
        for host in clients:
            self.machines[host.name] = Machine(host, folder, settings | {"ROLE": "client"})
        self.server.boot()
        for host in clients:
            self.machines[host.name].boot(wait=False)
        for machine in self.machines.values():
            machine.wait_until_ready()

    def __getitem__(self, name: str) -> "Machine":
        return self.machines[name]


class Machine:
    """A host with a kernel of its own.

    Attributes:
        name: the hostname.
        messages: the file with what its kernel said.
    """

    def __init__(
        self, host: Host, folder: Path, settings: dict[str, object], disk: Path | None = None
    ) -> None:
        self.host = host
        self.name = host.name
        self.folder = folder / host.name
        self.messages = folder / f"{host.name}.messages"
        last = host.address.rpartition(".")[2]
        self.settings = {
            "ADDRESS": f"{NETWORK}.{last}",
            "FOLDER": self.folder,
            "HOST": host.name,
        } | settings
        (card,) = json.loads(host.run(["ip", "-json", "link", "show", "eth0"]))
        self.command = [
            KERNEL,
            *("mem=1200M", f"uml_dir={folder}/", f"umid=uml-{host.name}"),
            *("rootfstype=hostfs", "rootflags=/", "rw", f"init={HERE / 'nfs_init.sh'}"),
            f"vec0:transport=raw,ifname=eth0,mac={card['address']}",
            *("con=null", "con0=null,fd:1"),
            *([f"ubd0={disk}"] if disk else []),
            *(f"{name}={value}" for name, value in self.settings.items()),
        ]

    def boot(self, *, wait: bool = True) -> None:
        """Switch it on, and wait until it answers."""
        if self.host.init is None:
            self.host.boot()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        self.jobs = 0
        self.host.start(self.command, self.messages, LD_PRELOAD=str(self.settings["PRELOAD"]))
        if wait:
            self.wait_until_ready()

    def wait_until_ready(self) -> None:
        """Wait until the machine answers."""

        def is_ready() -> bool:
            assert "Kernel panic" not in self.said(), self.said()
            return (self.folder / "ready").exists()

        until(is_ready, lambda: f"{self.name}: {self.said()}")

    def said(self) -> str:
        """Return the end of what its kernel said."""
        return self.messages.read_text(errors="replace")[-3000:]

    def power_off(self) -> None:
        """Cut the power."""
        self.host.power_off()

    def unplug(self) -> None:
        """Pull the cable out at the switch: the card, which would not recover, notices nothing."""
        self.host.cluster.run_on_switch("ip", "link", "set", self.host.port, "nomaster")

    def plug(self) -> None:
        """Put the cable back."""
        self.host.cluster.run_on_switch("ip", "link", "set", self.host.port, "master", "switch")

    def start(self, script: Path, *arguments: str) -> "Job":
        """Start a Python script on the machine."""
        self.jobs += 1
        job = Job(self, self.folder / f"{self.jobs}.job")
        temporary = job.file.with_suffix(".new")
        temporary.write_text(json.dumps([str(script), *arguments]))
        temporary.rename(job.file)
        return job


class Job:
    """A script on a machine."""

    def __init__(self, machine: Machine, file: Path) -> None:
        self.machine = machine
        self.file = file

    def kill(self) -> None:
        """Have the script killed, with SIGKILL."""
        self.file.with_suffix(".kill").touch()

    def output(self) -> str:
        """Return what the script has said."""
        with suppress(FileNotFoundError):
            return self.file.with_suffix(".out").read_text()
        return ""

    def code(self) -> int | None:
        """Return its exit code, or None while it runs."""
        with suppress(FileNotFoundError):
            return int(self.file.with_suffix(".code").read_text())
        return None

    def wait(self, patience: float = PATIENCE) -> int:
        """Return its exit code when it has ended."""
        until(lambda: self.code() is not None, self.describe, patience)
        code = self.code()
        assert code is not None
        return code

    def wait_for(self, text: str, patience: float = PATIENCE) -> None:
        """Wait until it has said ``text``."""
        until(lambda: text in self.output(), lambda: f"not {text!r}: {self.describe()}", patience)

    def describe(self) -> str:
        """Return what the script and its machine said."""
        return f"{self.machine.name}: {self.output()}\n{self.machine.said()}"


def until(
    happened: Callable[[], bool], describe: Callable[[], str], patience: float = PATIENCE
) -> None:
    """Wait until ``happened``, at most ``patience`` seconds."""
    end = time.monotonic() + patience
    while not happened():
        assert time.monotonic() < end, f"not within {patience:.0f} s: {describe()}"
        time.sleep(0.05)


def wide_registers(folder: Path) -> Path:
    """Return the compiled nfs_registers.c."""
    library = folder / "nfs_registers.so"
    check(["cc", "-shared", "-fPIC", "-o", str(library), str(HERE / "nfs_registers.c"), "-ldl"])
    return library


def why_no_nfs() -> str:
    """Return why no machines can be made here, or nothing if they can."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    if missing := [tool for tool in TOOLS if not shutil.which(tool, path=path)]:
        packages = "user-mode-linux nfs-kernel-server nfs-common kmod e2fsprogs gcc libc6-dev"
        return f"not installed: {', '.join(missing)} (Debian: {packages})"
    return ""
