"""Machines that train the run of ``copied_run.py``: each is a directory that can be wiped."""

import re
import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

from exact_resume.checkpoint.compare import diff_checkpoints, first_divergence
from exact_resume.checkpoint.store import CorruptCheckpointError, Store, load_state
from exact_resume.metrics import MetricsCSV
from runs import ROOT, fork
from s3_server import BUCKET, S3Server

SCRIPT = ROOT / "tests" / "copied_run.py"
ANNOUNCED = re.compile(r"step (\d+) is in the second copy")


class Machine:
    """One machine, on which always the same command is run.

    Args:
        tmp: where its directory is.
        name: of its directory.
        url: of the second copy.
        steps: of the run.
        fault: of ``careless_copy.py``.

    Attributes:
        home: the run's directory.
        steps: of the run.
        announced: the newest step that any of its processes said to be copied.
    """

    def __init__(
        self, tmp: Path, name: str, url: str = "none", steps: int = 300, fault: str = ""
    ) -> None:
        self.home = tmp / name
        self.steps = steps
        careless = [str(SCRIPT.parent / "library" / "careless_copy.py"), fault]
        self.words = [*careless, str(SCRIPT)] if fault else [str(SCRIPT)]
        self.words += [str(self.home), url, str(steps)]
        self.announced = -1
        self.process: BaseProcess | None = None

    def start(self) -> None:
        """Run the command; what the last process printed is gone."""
        for kind in ("out", "err"):
            self.home.with_suffix(f".{kind}").unlink(missing_ok=True)
        self.process, self.out, self.err = fork(self.home.parent, self.home.name, self.words)

    def said(self) -> str:
        """Return what the last process printed."""
        return "".join(path.read_text() for path in (self.out, self.err) if path.exists())

    def copied(self) -> int:
        """Return the newest step that was ever said to be copied, -1 if none."""
        logs = sorted(self.home.glob("attempts/*/log.txt"))
        text = logs[-1].read_text() if logs else ""
        steps = [int(step) for step in ANNOUNCED.findall(text)]
        self.announced = max([self.announced, *steps])
        return self.announced

    def wait(self, happened: Callable[[], bool], seconds: float = 600) -> None:
        """Return when something ``happened`` while it trains."""
        deadline = time.monotonic() + seconds
        while not happened():
            assert self.process is not None
            assert self.process.exitcode is None, f"it ended first: {self.said()}"
            assert time.monotonic() < deadline, f"it did not happen: {self.said()}"
            time.sleep(0.005)

    def wait_for_step(self, step: int) -> None:
        """Return when its record has ``step``."""
        self.wait(lambda: self.step() >= step)

    def step(self) -> int:
        """Return the newest step in its record; 0 without one."""
        metrics = self.home / "metrics.csv"
        if not metrics.exists():
            return 0
        lines = metrics.read_text().splitlines()[1:]
        return max((int(line.split(",")[0]) for line in lines[:-1]), default=0)

    def newest(self) -> int:
        """Return the step of its newest checkpoint, or -1."""
        return max(Store(self.home / "checkpoints").steps(), default=-1)

    def kill(self) -> None:
        """SIGKILL its process, which may have ended."""
        assert self.process is not None
        self.process.kill()
        self.process.join()
        assert self.process.exitcode in (-signal.SIGKILL, 0), self.said()
        self.copied()

    def stop(self) -> None:
        """Send SIGTERM to its process."""
        assert self.process is not None
        self.process.terminate()

    def wipe(self) -> None:
        """Kill its process, and lose its disk."""
        self.kill()
        shutil.rmtree(self.home, ignore_errors=True)

    def end(self, code: int = 0) -> str:
        """Wait for its process, which must exit with ``code``; return what it printed."""
        assert self.process is not None
        self.process.join(900)
        said = self.said()
        assert self.process.exitcode == code, f"exit code {self.process.exitcode}: {said}"
        assert "Traceback" not in said
        return said

    def finish(self, code: int = 0) -> str:
        """Run the command to its end; return what it printed."""
        self.start()
        return self.end(code)

    def entered(self) -> int:
        """Return the step that its process resumed from; 0 if afresh, -1 if it is not so far."""
        said = self.said()
        found = re.search(r"resumed from step (\d+)", said)
        return int(found[1]) if found else (0 if ": fresh" in said else -1)


def assert_same_bits(one: Path, two: Path, steps: int) -> None:
    """Check that two runs ended at ``steps`` with the same state and the same record."""
    states = []
    for home in (one, two):
        store = Store(home / "checkpoints")
        assert store.steps()[-1] == steps
        states.append(load_state(store.state(steps)))
    assert diff_checkpoints(*states) == []
    assert states[0]["optimizer_states"][0]["state"], "there is something to compare"
    rows = [MetricsCSV(home / "metrics.csv").rows() for home in (one, two)]
    assert len(rows[0]) >= steps
    assert first_divergence(*rows) is None


def check_copy(server: S3Server, prefix: str, tmp: Path) -> list[int]:
    """Read a second copy as any tool would; return its steps, each of which must verify.

    Its record must not be older than its newest checkpoint.
    """
    steps, broken = read_copy(server, prefix, tmp)
    assert not broken, f"not whole: {broken}"
    if steps:
        (tmp / "metrics.csv").write_bytes(server.read(f"{prefix}/metrics.csv"))
        assert steps[-1] in MetricsCSV(tmp / "metrics.csv").column("train/loss")
    return steps


def read_copy(server: S3Server, prefix: str, tmp: Path) -> tuple[list[int], dict[int, str]]:
    """Return the steps that have a manifest in a second copy, and why some do not verify."""
    shutil.rmtree(tmp, ignore_errors=True)
    client = server.client()
    for key in server.keys(f"{prefix}/checkpoints/"):
        path = tmp / key.removeprefix(f"{prefix}/checkpoints/")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            client.download_file(BUCKET, key, str(path))
        except client.exceptions.ClientError:
            continue  # deleted meanwhile
    store = Store(tmp)
    broken = {}
    steps = [step for step in store.steps() if (store.path(step) / "manifest.json").exists()]
    for step in steps:
        try:
            store.verify(step)
        except CorruptCheckpointError as reason:
            broken[step] = str(reason)
    return steps, broken
