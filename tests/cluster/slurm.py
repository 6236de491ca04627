"""A real SLURM on hosts of ``hosts.py``: one host decides, the others are nodes.

All of its files are in one folder, and nothing of it is in ``/etc``. It ends with its hosts.
Debian has it: apt-get install --no-install-recommends slurm-wlm slurmctld slurmd slurm-client munge

    with Cluster(tmp_path, ["head", "h1", "h2"]) as cluster:
        slurm = Slurm(cluster, tmp_path / "slurm")
        job = slurm.submit(script, tmp_path)
        slurm.until(job, "COMPLETED")
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from hosts import Cluster, Host

from runs import ROOT

PROGRAMS = ("munged", "sbatch", "scancel", "scontrol", "slurmctld", "slurmd", "squeue", "srun")
CPUS = 8  # of a node; as many as one likes, whatever the machine has
CONF = """\
ClusterName=trial
SlurmctldHost=head
AuthType=auth/munge
# A job that is queued again waits for as long as its credential is valid: 120 s by default.
AuthInfo=socket={folder}/munge.socket,cred_expire=10
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
# Needs no cgroups, of which containers have none to give.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MpiDefault=none
ReturnToService=2
# How soon a lost node is noticed: 300 s by default.
SlurmdTimeout=20
KillWait=30
SchedulerParameters=sched_interval=5,bf_interval=10
SlurmdParameters=config_overrides
NodeName={nodes} CPUs={cpus} RealMemory=8000 State=UNKNOWN
PartitionName=low Nodes={nodes} Default=YES PriorityTier=1 State=UP MaxTime=INFINITE
PartitionName=high Nodes={nodes} PriorityTier=10 PreemptMode=OFF State=UP MaxTime=INFINITE
"""


class Slurm:
    """SLURM on the hosts of ``cluster``: the first one decides, and the others are nodes.

    Attributes:
        head: the host that decides, named ``head``.
        nodes: the other hosts, by name.
    """

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        """Start it, and wait until all nodes are there.

        Args:
            cluster: The first host must be called ``head``.
            folder: For all files of SLURM; it must not exist.
        """
        self.folder = folder
        self.nodes = dict(cluster.hosts)
        self.head = self.nodes.pop("head")
        folder.mkdir()
        (folder / "state").mkdir()
        key = folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        self.conf = folder / "slurm.conf"
        names = ",".join(self.nodes)
        self.conf.write_text(CONF.format(folder=folder, nodes=names, cpus=CPUS))
        paths = [str(ROOT / "src"), str(ROOT / "tests"), str(ROOT / "tests" / "cluster")]
        self.environment = {
            "SLURM_CONF": str(self.conf),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin",
            "PYTHONPATH": ":".join([*paths, os.environ.get("PYTHONPATH", "")]),
        }
        # Foreign owners of the folders above are no danger here; so --force.
        munged = ["munged", "--foreground", "--force", f"--key-file={key}"]
        for name in ("socket", "log-file", "pid-file", "seed-file"):
            munged.append(f"--{name}={folder}/munge.{name.removesuffix('-file')}")
        self._start(self.head, munged)
        wait(lambda: (folder / "munge.socket").exists(), "munged")
        self._start(self.head, ["slurmctld", "-D"])
        for node in self.nodes.values():
            self.boot(node)

    def boot(self, node: Host) -> None:
        """Start slurmd on a node, which is switched on first; wait until jobs can run on it."""
        if node.init is None:
            node.boot()
        (self.folder / node.name).mkdir(exist_ok=True)
        self._start(node, ["slurmd", "-D", "-N", node.name])
        wait(lambda: self._state_of(node) in ("idle", "mixed"), f"node {node.name}")

    def run(self, *command: str, cwd: Path | None = None) -> str:
        """Return what ``command`` prints on the head; it must end with 0."""
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        return self.head.run(["env", *variables, *command], cwd)

    def submit(self, script: str, cwd: Path, *options: str) -> str:
        """Hand ``script`` to sbatch, in the folder ``cwd``; return the job's number."""
        file = cwd / "job.sh"
        file.write_text(script)
        return self.run("sbatch", "--parsable", *options, str(file), cwd=cwd).strip()

    def job(self, number: str) -> dict[str, str]:
        """Return what SLURM knows of a job, such as JobState, Restarts and NodeList."""
        words = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, number: str) -> str:
        """Return the state of a job, such as RUNNING."""
        return self.job(number)["JobState"]

    def until(self, number: str, state: str, seconds: float = 300) -> dict[str, str]:
        """Wait until a job is in ``state``; return what SLURM knows of it."""
        wait(lambda: self.state(number) == state, f"job {number} is {state}", seconds)
        return self.job(number)

    def hosts_of(self, number: str) -> list[Host]:
        """Return the nodes on which a job runs."""
        names = self.run("scontrol", "show", "hostnames", self.job(number)["NodeList"])
        return [self.nodes[name] for name in names.split()]

    def _state_of(self, node: Host) -> str:
        try:
            return self.run("sinfo", "--noheader", "--format=%T", f"--nodes={node.name}").split()[0]
        except (AssertionError, IndexError):  # slurmctld does not answer yet
            return "unknown"

    def _start(self, host: Host, command: list[str]) -> "subprocess.Popen[bytes]":
        log = self.folder / f"{host.name}-{command[0]}.out"
        return host.start(command, log, self.folder, **self.environment)


def wait(happened: Callable[[], bool], what: str, seconds: float = 120) -> None:
    """Wait until ``happened``; fail after ``seconds``."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.2)


def why_impossible() -> str:
    """Return why there can be no SLURM here, or nothing if it can."""
    path = f"{os.environ['PATH']}:/usr/sbin"
    if missing := [name for name in PROGRAMS if not shutil.which(name, path=path)]:
        packages = "slurm-wlm slurmctld slurmd slurm-client munge"
        return f"not installed: {', '.join(missing)} (Debian: {packages})"
    return ""


def documented_block(part: str) -> str:
    """Return the block of the documentation that has ``part`` in it, and needs SLURM."""
    page = (ROOT / "docs" / "guides" / "slurm-and-clusters.md").read_text()
    blocks = re.findall(r"^<!-- needs: slurm -->\n```bash\n(.*?)^```$", page, re.M | re.S)
    (block,) = [block for block in blocks if part in block]
    return block


def replace(text: str, changes: dict[str, str]) -> str:
    """Return ``text`` with each key of ``changes``, which must be in it, replaced by its value."""
    for old, new in changes.items():
        assert old in text, f"{old!r} is not in:\n{text}"
        text = text.replace(old, new)
    return text
