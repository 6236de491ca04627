"""Copy a run elsewhere in the background, while training goes on.

What is left to do is no queue: it is what the store has, the rule of retention keeps, and the
second copy lacks. The newest goes first. So nothing is lost by a kill, and an outage costs no
memory. An error never stops or slows training: it is tried again, with one line when the copy falls
behind and one when it is whole again. Only a newer start of the same run, elsewhere, stops it.

Nothing here calls torch: see ``HostBuffers`` in ``writer.py``.
"""

import io
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO

from exact_resume.checkpoint.reading import (
    MANIFEST,
    CorruptCheckpointError,
    parse_manifest,
    step_dirname,
)
from exact_resume.checkpoint.remote import (
    CHECKPOINTS,
    LostOwnershipError,
    Remote,
    step_name,
    steps_in,
)
from exact_resume.checkpoint.remote_record import RecordCopier
from exact_resume.checkpoint.store import SCORE, Store

RETRY_DELAYS = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0)  # seconds; the last one is repeated
Keep = Callable[[Sequence[int], Mapping[int, float]], set[int]]

log = logging.getLogger(__name__)


class Copier:
    """One thread that copies the run in ``home`` to ``remote``.

    Args:
        remote: the place of the second copy.
        home: the run's directory.
        store: its checkpoints.
        delays: seconds before each further attempt.

    Attributes:
        keep: returns which of the given steps are kept, by their scores; None to delete nothing.
        monitor: the metric of the scores.
        error: why the run must stop: a newer start of it copies there.
    """

    def __init__(
        self,
        remote: Remote,
        home: Path,
        store: Store,
        *,
        delays: Sequence[float] = RETRY_DELAYS,
    ) -> None:
        self.remote = remote
        self.store = store
        self.record = RecordCopier(remote, home)
        self.delays = delays
        self.keep: Keep | None = None
        self.monitor = ""
        self.error: LostOwnershipError | None = None
        self.is_claimed = False
        self.failures = 0  # in a row
        self.present: set[int] = set()  # steps with any file there
        self.complete: set[int] = set()  # steps with a manifest there
        self.same: set[int] = set()  # steps whose manifest there is the one here
        self.damaged: set[int] = set()  # steps that do not verify here
        self.scores: dict[int, float] = {}  # of the checkpoints there
        self.newest = -1  # step of the newest checkpoint there, as far as is known
        self.lock = threading.Lock()  # of the next two
        self.wanted = threading.Event()
        self.idle = threading.Event()
        self.stopping = threading.Event()
        self.thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread, unless it runs already."""
        if self.thread is None:
            self.wake()
            self.thread = threading.Thread(target=self._run, name="second copy", daemon=True)
            self.thread.start()

    def wake(self) -> None:
        """Say that there is something new to copy."""
        with self.lock:
            self.idle.clear()
            self.wanted.set()

    def check(self) -> None:
        """Raise LostOwnershipError if a newer start of this run copies there."""
        if self.error:
            raise self.error

    def wait(self, seconds: float, *, patience: float, stop: Callable[[], bool]) -> bool:
        """Wait until everything is copied; return whether it is.

        Args:
            seconds: to wait at most.
            patience: seconds to wait while the place cannot be used.
            stop: asked now and then whether to wait no longer.
        """
        start = time.monotonic()
        failing_since = None
        while not self.idle.wait(0.1):
            now = time.monotonic()
            if not self.failures:
                failing_since = None
            elif failing_since is None:
                failing_since = now
            is_hopeless = failing_since is not None and now - failing_since > patience
            if self.error or stop() or is_hopeless or now - start > seconds:
                return False
        return True

    def close(self) -> None:
        """Let the thread end after the file that it copies now, without waiting for it."""
        self.stopping.set()
        self.wanted.set()

    def _run(self) -> None:
        while not self.stopping.is_set():
            self.wanted.wait()
            self.wanted.clear()
            try:
                while not self.stopping.is_set() and self.copy_next():
                    self._succeed()
                self._succeed()
                with self.lock:
                    if not self.wanted.is_set():
                        self.idle.set()
            except LostOwnershipError as error:
                self.error = error
                return
            except Exception as error:
                self._fail(error)
                delay = self.delays[min(self.failures, len(self.delays)) - 1]
                self.stopping.wait(delay)
                self.wanted.set()

    def copy_next(self) -> bool:
        """Copy the small files, the scores and the newest checkpoint that the copy lacks.

        Returns:
            whether there may be more to copy.

        Raises:
            LostOwnershipError: a newer start copies there.
            RemoteUnavailableError: the place cannot be used now.
        """
        if not self.is_claimed:
            self._claim()
        self.remote.check_owner()
        self._compare()
        missing = self._missing()
        if self.newest <= max(self.store.steps(), default=-1):
            self.record.copy()  # after the choice: it is never older than a checkpoint there
        for step in missing:
            if self._copy_step(step):
                self._delete_unneeded()
                return True
        self._delete_unneeded()
        return False

    def _claim(self) -> None:
        """Own the place that could not be reached at the start, unless a newer start does."""
        owner = self.remote.owner()
        if owner and owner.get("time", 0) > self.remote.started:
            self.remote.check_owner()
        self.remote.claim()
        self.is_claimed = True
        there = max(self.remote.steps(), default=-1)
        if there > max(self.store.steps(), default=-1):
            log.warning(
                "the second copy in %s has step %d, which could not be seen at the start and is "
                "newer than what is here; to continue from there, start the run again",
                self.remote.url,
                there,
            )

    def _compare(self) -> None:
        """Find what is there: which checkpoints are complete, and which are as they are here."""
        files = self.remote.files(CHECKPOINTS)
        self.present = steps_in(files)
        self.complete = steps_in(files, MANIFEST)
        self.newest = max(self.complete, default=-1)
        self.same &= self.complete
        for step in self.complete.intersection(self.store.steps()) - self.same:
            try:
                here = (self.store.path(step) / MANIFEST).read_bytes()
                if here == self.remote.read(f"{step_name(step)}/{MANIFEST}"):
                    self.same.add(step)
            except FileNotFoundError:
                continue  # deleted meanwhile, here or there
        for step in self.complete - steps_in(files, SCORE):
            if step in self.same:
                self._copy_score(step)
        for step in self.complete & steps_in(files, SCORE) - self.scores.keys():
            score = self.remote.score(step, self.monitor)
            if score is not None:
                self.scores[step] = score

    def _missing(self) -> list[int]:
        """Return the steps to copy, newest first."""
        steps = self.store.steps()
        wanted = self._kept(self.complete.union(steps))
        done = self.same | self.damaged
        return [step for step in reversed(steps) if step in wanted and step not in done]

    def _kept(self, steps: set[int]) -> set[int]:
        return self.keep(sorted(steps), self.scores) if self.keep else steps

    def _copy_step(self, step: int) -> bool:
        """Copy a checkpoint, its manifest last; return False if it is gone or damaged here."""
        directory = self.store.path(step)
        name = step_name(step)
        with ExitStack() as stack:
            # An open file stays readable when training deletes the checkpoint.
            try:
                manifest_bytes = (directory / MANIFEST).read_bytes()
                manifest = parse_manifest(directory)
                files: dict[str, IO[bytes]] = {}
                for file in manifest["files"]:
                    files[file] = stack.enter_context((directory / file).open("rb"))
            except (FileNotFoundError, CorruptCheckpointError) as reason:
                return self._is_damaged(step, reason)
            if step in self.present:
                self.remote.check_owner()
                self.remote.delete(step)  # what is left of another upload
            for file, content in files.items():
                _, sha256 = self.remote.put(f"{name}/{file}", content)
                if sha256 != manifest["files"][file]["sha256"]:
                    return self._is_damaged(step, f"{file} has changed since it was written")
            self._copy_score(step)
            self.remote.check_owner()
            self.remote.put(f"{name}/{MANIFEST}", io.BytesIO(manifest_bytes))
        self.same.add(step)
        self.complete.add(step)
        self.newest = max(self.newest, step)
        log.debug("step %d is in the second copy", step)
        return True

    def _copy_score(self, step: int) -> None:
        with suppress(FileNotFoundError), (self.store.path(step) / SCORE).open("rb") as file:
            self.remote.put(f"{step_name(step)}/{SCORE}", file)

    def _is_damaged(self, step: int, reason: object) -> bool:
        """Note that ``step`` does not verify here, unless it is gone; return False."""
        if self.store.path(step).exists():
            self.damaged.add(step)
            log.warning("%s is not copied, as it does not verify: %s", step_dirname(step), reason)
        return False

    def _delete_unneeded(self) -> None:
        """Delete there what the rule does not keep, and what interrupted uploads have left."""
        kept = self._kept(self.complete)
        left_over = self.present - self.complete - {*self.store.steps()}
        unneeded = (self.complete - kept) | left_over
        for step in sorted(unneeded):
            if step < self.newest:
                self.remote.check_owner()
                self.remote.delete(step)
                self.complete.discard(step)
                self.present.discard(step)
                self.scores.pop(step, None)

    def _succeed(self) -> None:
        if self.failures:
            log.info(
                "the second copy in %s is up again: the newest there is step %d",
                self.remote.url,
                self.newest,
            )
        self.failures = 0

    def _fail(self, error: Exception) -> None:
        self.failures += 1
        if self.failures == 1:
            log.warning(
                "the second copy in %s is behind: the newest there is %s (%s); trying again",
                self.remote.url,
                f"step {self.newest}" if self.newest >= 0 else "unknown",
                error,
            )
        log.debug("copying failed, %d in a row", self.failures, exc_info=True)
