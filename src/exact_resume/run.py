"""The directory of a run, and everything in it.

.lock           held by the one process that trains
checkpoints/    the store
metrics.csv     the record of steps and validations
skips.jsonl     batches that were left out
save_cost.json  what a save costs, with Checkpoint(every="auto")
attempts/001/   config, environment and log of each start
abandoned/001/  what a resume at an older step put aside
"""

import json
import logging
import os
import socket
import sys
import time
from pathlib import Path
from typing import IO, Any

from exact_resume.checkpoint.store import Store
from exact_resume.files import LockUnsupportedError, fsync, lock_file, make_directory
from exact_resume.metrics import MetricsCSV
from exact_resume.resume import ResumePoint
from exact_resume.skips import SkipLog

LOCK_TIMEOUT = 120.0  # seconds
# Files of a step beside its checkpoint: step-00000500.*
STEP_FILES = ("samples/step-*.png", "ema/step-*.ckpt")
TABLES = ("metrics.csv", "evaluations.csv")

log = logging.getLogger(__name__)


class AlreadyRunningError(Exception):
    """Another live process trains in this directory."""


class LockLostError(Exception):
    """This process had the run's lock, and may not have it any more."""


class Run:
    """One run in the directory ``home``.

    Attributes:
        store: its checkpoints.
        metrics: its record.
    """

    def __init__(self, home: str | Path) -> None:
        self.home = Path(home)
        self.store = Store(self.home / "checkpoints", self.check_lock)
        self._metrics: MetricsCSV | None = None
        self._lock: IO[str] | None = None
        self._holder = ""  # what this process wrote into the lock's file

    @property
    def metrics(self) -> MetricsCSV:
        """The record of steps and validations."""
        if self._metrics is None:
            self._metrics = MetricsCSV(self.home / "metrics.csv")
        return self._metrics

    def skips(self) -> SkipLog:
        """Read the batches that were left out."""
        return SkipLog(self.home / "skips.jsonl")

    def newest_step(self) -> int:
        """Return the step of the newest checkpoint, or -1."""
        return max(self.store.steps(), default=-1)

    def lock(self, *, brief: bool = False, timeout: float = LOCK_TIMEOUT) -> IO[str]:
        """Hold the run for this process until it ends or the returned file is closed.

        The lock dies with its process, also by SIGKILL. A holder on another machine is waited for:
        over a network, the lock of a dead machine becomes free only when the server notices.

        Args:
            brief: the holder needs it for less than ``timeout``, and others wait for it.
            timeout: seconds to wait at most.

        Raises:
            AlreadyRunningError: with the host, process id and start time of the holder.
            OSError: the directory cannot be made, written or locked.
        """
        try:
            make_directory(self.home)
            file = open(self.home / ".lock", "r+", opener=_open_or_create)  # noqa: SIM115
            self._wait_for_lock(file, timeout)
        except LockUnsupportedError as error:
            raise LockUnsupportedError(f"{self.home} cannot be used: {error}") from None
        except PermissionError as error:
            raise PermissionError(
                f"{error.filename} cannot be written, permission denied"
            ) from None
        holder: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "start": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        if brief:
            holder["brief"] = True
        self._lock = file
        self._holder = json.dumps(holder)
        file.seek(0)
        file.truncate(0)
        file.write(self._holder)
        file.flush()
        fsync(file.fileno())  # so that another machine sees it
        return file

    def check_lock(self) -> None:
        """Check that this process still has the lock that it took; the store calls it.

        A file server gives the lock of a machine that was cut off to another one. It then refuses
        what the first one writes into the locked file.

        Raises:
            LockLostError: this process must not write in the run's directory any more.
        """
        if self._lock is None or self._lock.closed:
            return
        descriptor = self._lock.fileno()
        reason = "its file was replaced"
        try:
            if os.path.samestat(os.fstat(descriptor), (self.home / ".lock").stat()):
                holder = os.pread(descriptor, 1024, 0).decode(errors="replace")
                reason = f"it belongs to {_describe_holder(_parse_holder(holder))}"
                if holder == self._holder:
                    os.pwrite(descriptor, self._holder.encode(), 0)
                    fsync(descriptor)
                    return
        except OSError as error:
            reason = str(error)
        raise LockLostError(
            f"the lock of {self.home} is lost ({reason}). Another process may train there, so this "
            f"one stops; what it saved before is complete"
        )

    def next_attempt(self) -> Path:
        """Make the directory of the next attempt."""
        directory = self.home / "attempts" / _next_number(self.home / "attempts")
        directory.mkdir(parents=True)
        return directory

    def archive_newer(self, point: ResumePoint | None) -> None:
        """Put aside everything newer than ``point`` (None: everything), and cut the record there.

        So ``ckpt_path=auto`` never returns to it, and nothing is lost. Without newer checkpoints,
        a kill has only cut off what will come again, and that is deleted. A crash in here loses
        nothing.
        """
        last = self.branch_step(point)
        newer_files = self._files_after(last)
        newer_steps = [step for step in self.store.steps() if step > last]
        if newer_steps:
            archive = self.home / "abandoned" / _next_number(self.home / "abandoned")
            make_directory(archive)
            self._archive_rows(last, archive)
            for file in newer_files:
                make_directory(archive / file.parent.name)
                file.rename(archive / file.parent.name / file.name)
            self.store.move_newer(last, archive)
            log.info(
                "checkpoints newer than step %d were moved to %s: %s",
                max(last, 0),
                archive,
                newer_steps,
            )
        for file in newer_files:
            file.unlink(missing_ok=True)
        self.metrics.cut(last)

    def branch_step(self, point: ResumePoint | None) -> int:
        """Return the newest step that a resume at ``point`` keeps; -1 if it is of another run."""
        if point is None or point.state.parent.parent.resolve() != self.store.directory.resolve():
            return -1
        return point.step

    def _files_after(self, step: int) -> list[Path]:
        found = []
        for pattern in STEP_FILES:
            found += [path for path in self.home.glob(pattern) if int(path.stem[5:]) > step]
        return found

    def _archive_rows(self, last: int, archive: Path) -> None:
        """Copy the rows after step ``last``; those of the record itself are cut at the end."""
        for name in TABLES:
            table = MetricsCSV(self.home / name)
            copy = MetricsCSV(archive / name)
            for row in table.rows():
                step = int(row["step"])
                if step > last:
                    values = {k: float(v) for k, v in row.items() if k != "step" and v}
                    copy.log_metrics(values, step)
            if name != "metrics.csv":
                table.cut(last)

    def _wait_for_lock(self, file: IO[str], timeout: float) -> None:
        """Return when ``file`` is locked; close it and raise if it is not to be waited for."""
        deadline = time.monotonic() + timeout
        announced = False
        while not lock_file(file):
            file.seek(0)
            holder = _parse_holder(file.read())
            is_remote = holder.get("host", socket.gethostname()) != socket.gethostname()
            may_wait = holder.get("brief") or is_remote
            if not may_wait or time.monotonic() > deadline:
                file.close()
                raise AlreadyRunningError(
                    f"{self.home} is in use by {_describe_holder(holder)}. Wait for it, stop it, "
                    f"or give this run another directory"
                )
            if is_remote and not announced:
                announced = True
                print(
                    f"{self.home} is in use by {_describe_holder(holder)}; waiting up to "
                    f"{timeout:.0f} s, in case that machine died",
                    file=sys.stderr,
                    flush=True,
                )
            time.sleep(0.05)


def _open_or_create(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT, 0o644)


def _next_number(directory: Path) -> str:
    """Return the name of the next numbered folder, ``001`` first."""
    numbers = [int(path.name) for path in directory.glob("*") if path.name.isdigit()]
    return f"{max(numbers, default=0) + 1:03}"


def _parse_holder(text: str) -> dict[str, Any]:
    """Parse what the holder wrote; return an empty dict if it was not written completely."""
    try:
        holder = json.loads(text)
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _describe_holder(holder: dict[str, Any]) -> str:
    if not {"pid", "host", "start"} <= holder.keys():
        return "another process"
    return f"process {holder['pid']} on {holder['host']}, started {holder['start']}"
