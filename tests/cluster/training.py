"""A run on several hosts under torchrun, and what may happen to it."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from hosts import Cluster, Host
from record import Strike, record

from exact_resume.checkpoint.store import Store
from exact_resume.metrics import read_rows
from runs import ROOT, command, differences, train
from worlds import SHARDED

ENDLESS = 1_000_000  # steps
BEGUN = f"to step {ENDLESS}"
PATIENCE = 300.0  # seconds until a strike must be over
BASE = [*(word for word in SHARDED if word != "trainer=cpu"), "trainer=multi_node"]
BASE += ["trainer.accelerator=cpu", "trainer.precision=32-true"]
CALM = ["callbacks.samples.every_n_steps=1000000", "trainer.log_every_n_steps=1"]
CALM += ["trainer.val_check_interval=200", "callbacks.checkpoint.every_n_train_steps=20"]
# docs/guides/slurm-and-clusters.md
LOOP = """
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
until torchrun --nnodes=1:3 --nproc-per-node=1 --max-restarts=100 --rdzv-backend=c10d \\
    --rdzv-endpoint=h1:29400 --rdzv-conf=last_call_timeout=5 "$@"; do sleep 10; done
"""


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
            shell = ["bash", "-c", LOOP, "torchrun.sh", *line]
            self.loops[host.name] = host.start(shell, self.log(host), ROOT, PATH=path)

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

    def resumed_from(self) -> dict[str, int]:
        """Return the step at which each attempt began; one that does not train yet has none."""
        found = {}
        for log in sorted(self.home.glob("attempts/*/log.txt")):
            said = log.read_text()
            if begun := re.search(r"; resumed from step (\d+)|; (fresh)", said):
                found[log.parent.name] = int(begun[1] or 0)
        return found

    def last_start(self) -> str:
        """Return what the newest attempt that trains said when it began."""
        logs = sorted(self.home.glob("attempts/*/log.txt"), reverse=True)
        lines = [line for log in logs for line in log.read_text().splitlines() if BEGUN in line]
        return lines[0] if lines else ""

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
        self, fault: str, act: Callable[[], object], *, patience: float = PATIENCE
    ) -> Strike:
        """Do ``act`` to the running training, and wait until it trains again.

        Args:
            fault: what ``act`` does, in words.
            act: it may take its time, which counts.
            patience: seconds until a new step must have been trained.
        """
        attempts = self.resumed_from().keys()
        last, saved = self.last_step(), self.store.steps()[-1]
        written: list[int] = []
        begun = time.monotonic()
        act()

        def is_training() -> bool:
            new = [step for name, step in self.resumed_from().items() if name not in attempts]
            if not new:  # nothing was started again; a step was perhaps being recorded
                return self.last_step() > last + 2
            # Who wrote into the record before is dead. It is cut at a start, and then goes on.
            written.append(self.metrics.stat().st_mtime_ns)
            return written[-1] != written[0] and self.last_step() > new[-1]

        self.until(is_training, f"a step after: {fault}", patience)
        seconds = time.monotonic() - begun
        resumed = [step for name, step in self.resumed_from().items() if name not in attempts]
        first = min(resumed, default=last)
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
        train(self.tmp, "one", *CALM, f"trainer.max_steps={last}", base=SHARDED)
        odd = differences(self.tmp, "one", self.name)
        record(self.strikes, equal=not odd)
        assert odd == []
        assert all(strike.lost == 0 for strike in self.strikes)
