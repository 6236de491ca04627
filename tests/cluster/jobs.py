"""A run that is a job of SLURM, by the scripts of the documentation, and what may happen to it."""

import os
import shlex
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from host_training import Training
from hosts import Host
from record import Strike
from slurm import CPUS, Slurm, documented_block, replace, wait
from typing_extensions import override

from runs import ROOT, start

TINY = [
    *("backbone.width=32", "backbone.depth=1", "backbone.heads=2"),
    *("data.image_size=16", "data.batch_size=8", "data.source.n=60"),
    *("data.shards=4", "reduction=tree", "trainer.threads=1"),
    *("trainer.val_check_interval=100", "trainer.log_every_n_steps=1"),
    *("callbacks.checkpoint.every_n_train_steps=20", "callbacks.samples=null"),
]
PACE = ["+callbacks.pace._target_=pace.Pace", "+callbacks.pace.seconds=0.12"]
DAY = "1-00:00:00"
GPUS_AND_PATHS = {
    "#SBATCH --gpus-per-node=4\n": "",
    "python train.py": f"python {ROOT}/train.py",
}


def single_node_script(*words: str) -> str:
    """Return the documented script for one node, changed to what a node here can do."""
    script = documented_block("srun --ntasks=1")
    small = ["trainer=cpu", "trainer.devices=2", *TINY, *PACE, *words]
    changes = {"--cpus-per-task=32": "--cpus-per-task=4", "trainer=multi_gpu": " ".join(small)}
    return replace(script, GPUS_AND_PATHS | changes)


def two_node_script(*words: str) -> str:
    """Return the documented script for two nodes, with one process on each."""
    script = documented_block("--nodes=2")
    cpu = ["trainer=slurm", "trainer.accelerator=cpu", "trainer.precision=32-true"]
    small = [*cpu, *TINY, *PACE, *words]
    changes = {
        "--ntasks-per-node=4": "--ntasks-per-node=1",
        "--cpus-per-task=8": "--cpus-per-task=2",
    }
    changes |= {"trainer=slurm": " ".join(small)}
    return replace(script, GPUS_AND_PATHS | changes)


def sweep_command(*words: str) -> list[str]:
    """Return the documented command of a sweep, over two seeds only."""
    block = documented_block("hydra/launcher=slurm")
    (line,) = [line for line in block.splitlines() if "train.py" in line]
    changes = {"python train.py": f"python {ROOT}/train.py", "optimizer.lr=1e-3,3e-3 ": ""}
    slim = ["hydra.launcher.gpus_per_node=null", "hydra.launcher.cpus_per_task=2"]
    return [*shlex.split(replace(line, changes)), *slim, "trainer=cpu", *TINY, *PACE, *words]


class Job(Training):
    """A run that is a job of SLURM.

    Args:
        slurm: its nodes; nothing runs on them yet.
        tmp: the folder in which the job is submitted.
        name: of the run.
    """

    def __init__(self, slurm: Slurm, tmp: Path, name: str = "cars") -> None:
        super().__init__(slurm.head.cluster, tmp, name)
        self.slurm = slurm
        self.number = ""

    def submit(self, script: str) -> None:
        """Hand ``script`` to sbatch, and wait until it trains."""
        last = self.last_step()
        self.number = self.slurm.submit(script, self.tmp)
        self.until(lambda: self.last_step() > last, "the job trains")

    @override
    def strike(self, fault: str, act: Callable[[], object], **how: Any) -> Strike:
        """As that of ``Training``; the job must have been started again."""
        before = len(self.starts())

        def act_and_wait() -> None:
            act()
            self.until(lambda: len(self.starts()) > before, f"a start after: {fault}")

        return super().strike(f"SLURM: {fault}", act_and_wait, **how)

    @override
    def output(self) -> str:
        """Return what the jobs said, and what SLURM says of the last one."""
        files = [*self.tmp.glob("*.txt"), *self.tmp.glob("*.out")]
        said = [f"== {file.name}\n{file.read_text()[-6000:]}" for file in files]
        return "\n".join([*said, str(self.slurm.job(self.number))])

    def node(self) -> Host:
        """Return the first node on which the job runs."""
        return self.slurm.hosts_of(self.number)[0]

    def reach_time_limit(self) -> None:
        """Have SLURM signal the job and queue it again; then it has a day again."""
        restarts = self.restarts()
        self.come_near_time_limit()
        self.until(lambda: self.restarts() > restarts, "queued again")
        self.set_time_limit(DAY)

    def come_near_time_limit(self) -> None:
        """Leave the job less than the 5 minutes at which SLURM signals it."""
        hours, minutes, _ = self.slurm.job(self.number)["RunTime"].split(":")
        self.set_time_limit(str(60 * int(hours) + int(minutes) + 4))

    def set_time_limit(self, limit: str) -> None:
        """Set the time limit of the job, in minutes or in words of SLURM."""
        self.slurm.run("scontrol", "update", f"JobId={self.number}", f"TimeLimit={limit}")

    def restarts(self) -> int:
        """Return how often the job was queued again."""
        return int(self.slurm.job(self.number)["Restarts"])

    def requeue(self) -> None:
        """Have the job queued again, as an administrator does."""
        self.slurm.run("scontrol", "requeue", self.number)

    def preempt(self) -> None:
        """Submit a job of higher priority that needs the whole node."""
        whole = ["--partition=high", f"--nodelist={self.node().name}", f"--cpus-per-task={CPUS}"]
        self.slurm.run("sbatch", *whole, "--output=/dev/null", "--wrap=sleep 5")

    def cancel(self) -> None:
        """Cancel the job; nothing of it may stay, and it must not come back."""
        hosts = self.slurm.hosts_of(self.number)
        self.slurm.run("scancel", self.number)
        self.slurm.until(self.number, "CANCELLED", 120)
        for host in hosts:
            wait(lambda host=host: host.pids("train.py") == [], f"no process on {host.name}")
        time.sleep(12)  # longer than a job waits that is queued again
        assert self.slurm.state(self.number) == "CANCELLED"

    def cancel_and_submit(self, script: str) -> None:
        """Cancel the job, and have the same run go on as a new one."""
        self.cancel()
        self.submit(script)

    def kill_process(self, host: Host) -> None:
        """Kill the process on ``host`` that trains."""
        for pid in host.pids("train.py"):  # the first may be srun
            if "python" in os.readlink(f"/proc/{pid}/exe"):
                os.kill(pid, signal.SIGKILL)
                return
        raise AssertionError(f"nothing trains on {host.name}")

    def finished(self, restarts: int) -> str:
        """Wait until the job is COMPLETED, after so many restarts; return its output."""
        job = self.slurm.until(self.number, "COMPLETED", 600)
        assert int(job["Restarts"]) == restarts, self.output()
        return self.output()


def undisturbed(tmp: Path, name: str, *words: str) -> None:
    """Train in one process that nobody disturbs."""
    base = ["experiment=cars", "trainer=cpu"]
    process, out, err = start(tmp, name, *TINY, *words, base=base)
    process.join(900)
    assert process.exitcode == 0, out.read_text() + err.read_text()
