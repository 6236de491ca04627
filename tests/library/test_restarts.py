"""``restarts=N``: the run finishes by itself whatever happens to either of its processes, and its
bits are the same.
"""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from exact_resume.checkpoint.store import Store
from exact_resume.distributed import store_prefix
from runs import ROOT, command, differences
from worlds import SHARDED, finish

PATIENT = [*SHARDED, "trainer.devices=2", "restarts=100"]
WATCHED = [
    "callbacks.watchdog.at_least=4",
    "callbacks.watchdog.start=40",
    "callbacks.watchdog.pause=30",
]


def children(pid: int) -> list[int]:
    """The process ids of the children of ``pid`` that live now."""
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for child in " ".join(c.read_text() for c in lists).split()]


class Supervised:
    """A run of two processes under the supervisor, by the door."""

    def __init__(self, tmp: Path, name: str, *overrides: str, sabotage: str = "") -> None:
        self.metrics = tmp / "runs" / name / "metrics.csv"
        self.log = tmp / f"{name}.out"
        words = command(tmp, name, *overrides, base=PATIENT, sabotage=sabotage)
        with self.log.open("a") as output:
            self.process = subprocess.Popen(words, stdout=output, stderr=output)

    def rank(self, number: int) -> int | None:
        """The process id of a rank, if it lives now."""
        for pid in children(self.process.pid):
            try:
                if f"RANK={number}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(
                    b"\0"
                ):
                    return pid
            except OSError:
                continue
        return None

    def strike(self, rank: int, number: signal.Signals) -> bool:
        """Whether there was one to send the signal to."""
        try:
            if pid := self.rank(rank):
                os.kill(pid, number)
                return True
        except ProcessLookupError:
            pass
        return False

    def until(self, step: int) -> None:
        while self.process.poll() is None:
            if self.metrics.exists() and any(
                r.startswith(f"{step},") for r in self.metrics.read_text().splitlines()
            ):
                return
            time.sleep(0.01)
        raise AssertionError(self.log.read_text())

    def until_it_trains(self) -> None:
        """Return when the record grows, or the run has ended."""
        size = self.metrics.stat().st_size if self.metrics.exists() else 0
        while self.process.poll() is None and (
            not self.metrics.exists() or self.metrics.stat().st_size <= size
        ):
            time.sleep(0.05)

    def wait(self) -> str:
        """What it printed, once it has finished."""
        code = self.process.wait(timeout=300)
        output = self.log.read_text()
        assert code == 0, output
        assert "Traceback" not in output
        assert "Warning" not in output
        return output


def test_a_killed_process_is_started_again(tmp_path: Path) -> None:
    finish(tmp_path, "one", 1)
    run = Supervised(tmp_path, "two")
    run.until(5)
    run.strike(1, signal.SIGKILL)
    output = run.wait()
    assert "restart 1 of 100: process 1 was killed by SIGKILL; newest checkpoint is step" in output
    assert "(bitwise" in output
    assert differences(tmp_path, "one", "two") == []


@pytest.mark.slow
def test_thirty_faults_of_four_kinds_at_random_instants(tmp_path: Path) -> None:
    """Told to stop, killed, stopped so that the other one hangs, or with an exception out of
    nowhere: either rank.
    """
    long = (
        "trainer.max_steps=4000",
        "trainer.val_check_interval=100",
        "callbacks.checkpoint.every_n_train_steps=50",
    )
    calm = ("callbacks.samples.every_n_steps=300",)
    finish(tmp_path, "one", 1, *long, *calm)
    kinds = (signal.SIGKILL, signal.SIGSTOP, signal.SIGUSR2, signal.SIGTERM)
    faults = [(kind, rank) for kind in kinds for rank in (0, 1)] * 5
    rng = random.Random(int(os.environ.get("STURDY_SEED", "0")))
    rng.shuffle(faults)
    run = Supervised(tmp_path, "struck", *long, *calm, *WATCHED, sabotage="throw-on-usr2")
    counts: dict[str, int] = {}
    for number, (kind, rank) in enumerate(faults):
        if number % 3:
            run.until_it_trains()
        time.sleep(rng.uniform(0, 3 if number % 3 else 8))  # one in three in start-up
        if run.process.poll() is not None:
            if run.process.returncode == 0:
                break
            run = Supervised(
                tmp_path, "struck", *long, *calm, *WATCHED, sabotage="throw-on-usr2"
            )  # out of patience
            continue
        if run.strike(rank, kind):
            counts[f"{kind.name} on {rank}"] = counts.get(f"{kind.name} on {rank}", 0) + 1
    if run.process.wait(timeout=300):
        run = Supervised(tmp_path, "struck", *long, *calm, *WATCHED)
        run.process.wait(timeout=300)
    print(counts)
    assert run.process.returncode == 0, run.log.read_text()
    assert sum(counts.values()) >= 30, counts
    assert differences(tmp_path, "one", "struck") == []


class Machine:
    """torchrun, one process, of a run that takes up to two machines; what it prints is in
    ``log``.
    """

    def __init__(self, tmp: Path, port: int, number: int, *words: str) -> None:
        elastic = [
            "--nnodes=1:2",
            "--nproc-per-node=1",
            "--max-restarts=10",
            "--rdzv-backend=c10d",
            "--rdzv-id=test",
        ]
        elastic += [f"--rdzv-endpoint=localhost:{port}", "--rdzv-conf=last_call_timeout=2"]
        environment = os.environ | {
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"
        }  # docs/guides/slurm-and-clusters.md says why
        self.log = tmp / f"machine-{number}.out"
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "torch.distributed.run",
                    *elastic,
                    str(ROOT / "train.py"),
                    *words,
                ],
                stdout=output,
                stderr=output,
                env=environment,
            )


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def until(happened: Callable[[], bool], *machines: Machine) -> None:
    """Return when it has happened; fail when a machine has ended, or after two minutes."""
    end = time.monotonic() + 120
    while not happened():
        logs = "\n".join(machine.log.read_text() for machine in machines)
        assert time.monotonic() < end, logs
        assert all(machine.process.poll() is None for machine in machines), logs
        time.sleep(0.05)


@pytest.mark.parametrize("store", ["True", "False"])
def test_machines_meet_whatever_each_has_counted(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where torchrun keeps the store, and has the addresses of the start before, its count tells
    the starts apart.
    """
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", store)
    prefixes = []
    for count in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        prefixes.append(store_prefix(2))
    assert (prefixes[0] == prefixes[1]) == (store == "False")
    assert store_prefix(4) != prefixes[1]


@pytest.mark.slow
def test_a_killed_process_of_one_machine_meets_that_of_the_other_again(tmp_path: Path) -> None:
    """Only its own torchrun counts that as a restart."""
    long = [
        "trainer.max_steps=400",
        "trainer.val_check_interval=200",
        "callbacks.checkpoint.every_n_train_steps=20",
    ]
    long += ["callbacks.samples.every_n_steps=400"]
    finish(tmp_path, "one", 1, *long)
    words = command(tmp_path, "elastic", *long, base=SHARDED)[2:]
    store = Store(tmp_path / "runs" / "elastic" / "checkpoints")
    port = free_port()
    machines = [Machine(tmp_path, port, number, *words) for number in (1, 2)]
    try:
        until(lambda: len(store.steps()) > 2, *machines)
        (process,) = children(machines[1].process.pid)
        os.kill(process, signal.SIGKILL)
        before = store.steps()[-1]
        until(lambda: store.steps()[-1] > before + 40, *machines)
        assert [machine.process.wait(timeout=120) for machine in machines] == [0, 0]
    finally:
        for machine in machines:
            machine.process.kill()
            machine.process.wait()
    said = "".join(machine.log.read_text() for machine in machines)
    assert said.count("2 processes; resumed") == 1
    assert differences(tmp_path, "one", "elastic") == []


@pytest.mark.slow
def test_a_machine_joins_and_is_lost(tmp_path: Path) -> None:
    """Both are this one, but torchrun does not know: it meets, parts and numbers its machines as
    ever.
    """
    long = [
        "trainer.max_steps=2000",
        "trainer.val_check_interval=500",
        "callbacks.checkpoint.every_n_train_steps=20",
    ]
    long += ["callbacks.samples.every_n_steps=2000"]
    finish(tmp_path, "one", 1, *long)
    words = command(tmp_path, "elastic", *long, base=SHARDED)[2:]
    store = Store(tmp_path / "runs" / "elastic" / "checkpoints")
    port = free_port()
    first = Machine(tmp_path, port, 1, *words)
    until(lambda: bool(store.steps()), first)
    second = Machine(tmp_path, port, 2, *words)
    try:
        until(
            lambda: "2 processes; resumed" in first.log.read_text() + second.log.read_text(), first
        )
        joined = store.steps()[-1]
        until(lambda: store.steps()[-1] > joined, first)
        second.process.kill()
        assert first.process.wait(timeout=300) == 0, first.log.read_text()
    finally:
        for machine in (first, second):
            machine.process.kill()
            machine.process.wait()
    assert "(bitwise" in first.log.read_text()
    assert "same samples" not in first.log.read_text() + second.log.read_text()
    assert differences(tmp_path, "one", "elastic") == []
