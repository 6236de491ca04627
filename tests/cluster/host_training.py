"""A run on several hosts under torchrun, and what may happen to it."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from hosts import Cluster, Host
from record import Strike, record

from exact_resume.checkpoint.store import Store
from exact_resume.metrics import read_rows
from runs import ROOT, command, differences, start
from worlds import SHARDED

ENDLESS = 1_000_000  # steps
BANNER = re.compile(r".* classes(?:, (\d+) processes.*?)?; (?:resumed from step (\d+)|fresh)")
PATIENCE = 300.0  # seconds until a strike must be over
BASE = [*(word for word in SHARDED if word != "trainer=cpu"), "trainer=multi_node"]
BASE += ["trainer.accelerator=cpu", "trainer.precision=32-true"]
CALM = ["callbacks.samples.every_n_steps=1000000", "trainer.log_every_n_steps=1"]
CALM += ["trainer.val_check_interval=200", "callbacks.checkpoint.every_n_train_steps=20"]
GUIDE = ROOT / "docs" / "guides" / "slurm-and-clusters.md"
HERE = {  # in the script of the guide
    "--nnodes=1:4 --nproc-per-node=8": "--nnodes=1:3 --nproc-per-node=1",
    "HOST": "h1",
    "read_timeout=900": "read_timeout=900,last_call_timeout=5",
    "train.py experiment=cars trainer=multi_node data.shards=32 reduction=tree": '"$@"',
    "runs/cars": '"$RUN"',
}


def script() -> str:
    """Return the script of the guide, for three hosts with one process each."""
    text = GUIDE.read_text().partition("## Several machines with torchrun")[2]
    found = text.partition("```bash\n")[2].partition("```")[0]
    for theirs, ours in HERE.items():
        assert theirs in found, f"{GUIDE} has another script"
        found = found.replace(theirs, ours)
    return found


class Start(NamedTuple):
    """Where a start of the run began, with how many processes, and what it said about that."""

    step: int
    processes: int
    banner: str


class Training:
    """A run on hosts of ``cluster``, in which torchrun is started as the documentation says.

    Args:
        cluster: its hosts; nothing runs on them yet.
        tmp: the run's directory is made here.
        name: of the run.
        sabotage: a fault of sabotage.py.
    """

    def __init__(self, cluster: Cluster, tmp: Path, name: str, sabotage: str = "") -> None:
        self.cluster = cluster
        self.tmp = tmp
        self.name = name
        self.sabotage = sabotage
        self.home = tmp / "runs" / name
        self.metrics = self.home / "metrics.csv"
        self.store = Store(self.home / "checkpoints")
        self.loops: dict[str, subprocess.Popen[bytes]] = {}
        self.strikes: list[Strike] = []

    def start(self, *hosts: Host, max_steps: int = ENDLESS, words: tuple[str, ...] = ()) -> None:
        """Start torchrun on ``hosts``."""
        words = (*CALM, *words, f"trainer.max_steps={max_steps}")
        line = command(self.tmp, self.name, *words, base=BASE, sabotage=self.sabotage)[1:]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        for host in hosts:
            shell = ["bash", "-c", script(), "torchrun.sh", *line]
            environment = {"PATH": path, "RUN": str(self.home), "LINGER": str(self.tmp)}
            self.loops[host.name] = host.start(shell, self.log(host), ROOT, **environment)

    def log(self, host: Host) -> Path:
        """Return the file with the output of ``host``."""
        return self.tmp / f"{self.name}-{host.name}.out"

    def output(self) -> str:
        """Return what all hosts said."""
        logs = sorted(self.tmp.glob(f"{self.name}-h*.out"))
        return "\n".join(f"== {log.name}\n{log.read_text()[-6000:]}" for log in logs)

    def last_step(self) -> int:
        """Return the last step in the record."""
        return max((int(row["step"]) for row in read_rows(self.metrics)), default=0)

    def starts(self) -> dict[str, Start]:
        """Return the starts that came as far as training, by the number of the attempt."""
        found = {}
        for log in sorted(self.home.glob("attempts/*/log.txt")):
            if said := BANNER.search(log.read_text()):
                found[log.parent.name] = Start(int(said[2] or 0), int(said[1] or 1), said[0])
        return found

    def last_start(self) -> Start:
        """Return the newest of ``starts``."""
        return list(self.starts().values())[-1]

    def until(self, happened: Callable[[], bool], what: str, patience: float = PATIENCE) -> None:
        """Wait for something that must happen within ``patience`` seconds."""
        end = time.monotonic() + patience
        while not happened():
            assert time.monotonic() < end, f"not within {patience:.0f} s: {what}\n{self.output()}"
            time.sleep(0.1)

    def train_on(self, steps: int = 60) -> None:
        """Wait until the run has trained ``steps`` more, and saved something meanwhile."""
        first, saved = self.last_step(), self.store.steps()[-1:]
        self.until(
            lambda: self.last_step() >= first + steps and self.store.steps()[-1:] > saved,
            f"{steps} steps after {first}",
        )

    def strike(
        self,
        fault: str,
        act: Callable[[], object],
        *,
        processes: int | None = None,
        patience: float = PATIENCE,
    ) -> Strike:
        """Do ``act`` to the running training, and wait until it trains again.

        Args:
            fault: what ``act`` does, in words.
            act: it may take its time, which counts.
            processes: so many must train; None if it does not matter.
            patience: seconds until a new step must have been trained.
        """
        before = self.starts()
        last, saved = self.last_step(), self.store.steps()[-1]
        written: list[int] = []
        begun = time.monotonic()
        act()

        def new_starts() -> list[Start]:
            return [start for name, start in self.starts().items() if name not in before]

        def is_training() -> bool:
            new = new_starts()
            if not new:  # a step may have been on its way
                return processes is None and self.last_step() > last + 2
            if processes not in (None, new[-1].processes):
                return False
            # Who wrote into the record before is dead. It is cut at a start, and then goes on.
            written.append(self.metrics.stat().st_mtime_ns)
            return written[-1] != written[0] and self.last_step() > new[-1].step

        self.until(is_training, f"a step after: {fault}", patience)
        seconds = time.monotonic() - begun
        first = min((start.step for start in new_starts()), default=last)
        strike = Strike(fault, round(seconds, 1), max(0, last - first), max(0, saved - first))
        print(strike, flush=True)
        self.strikes.append(strike)
        return strike

    def rank(self, host: Host) -> int:
        """Return the process that trains on ``host``."""
        for pid in host.pids("train.py"):
            try:
                if b"\0RANK=" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes():
                    return pid
            except OSError:
                continue
        raise AssertionError(f"nothing trains on {host.name}\n{self.output()}")

    def kill_rank(self, host: Host) -> None:
        """Kill the process that trains on ``host``; its torchrun lives."""
        os.kill(self.rank(host), signal.SIGKILL)

    def kill_torchrun(self, host: Host) -> None:
        """Kill torchrun on ``host``; what it has started dies with it, and its loop lives."""
        (torchrun,) = host.pids("/bin/torchrun")
        os.kill(torchrun, signal.SIGKILL)

    def interrupt(self, host: Host) -> None:
        """Press Ctrl-C in the terminal of ``host``."""
        for pid in host.pids("train.py"):  # the script, torchrun and the process that trains
            os.kill(pid, signal.SIGINT)

    def finish(self, *hosts: Host, words: tuple[str, ...] = ()) -> None:
        """Cut the power of all hosts, let ``hosts`` train 40 more steps, and compare the bits."""
        for host in self.cluster.hosts.values():
            host.power_off()
        last = self.last_step() + 40
        for host in hosts:
            host.boot()
        self.start(*hosts, max_steps=last, words=words)
        for host in hosts:
            self.until(lambda h=host: self.loops[h.name].poll() == 0, f"{host.name} has finished")
        process, out, err = start(self.tmp, "one", *CALM, f"trainer.max_steps={last}", base=SHARDED)
        process.join()
        assert process.exitcode == 0, out.read_text() + err.read_text()
        odd = differences(self.tmp, "one", self.name)
        record(self.strikes, equal=not odd)
        assert odd == []
        assert all(strike.lost == 0 for strike in self.strikes)
