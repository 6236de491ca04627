"""A second copy of a run, off its machine: copied to while it trains, fetched from when it starts.

The same command on a new, empty machine then continues the run: the start looks at the second copy
first, and the newest checkpoint that verifies wins, wherever it lies. One process (rank 0) does all
of this.

A run is never started afresh where its second copy cannot be seen.
"""

import logging
import re
import socket
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from exact_resume.checkpoint.remote import Remote, RemoteUnavailableError, describe_owner
from exact_resume.checkpoint.remote_copier import Copier
from exact_resume.checkpoint.remote_fetch import fetch_step, retry
from exact_resume.checkpoint.remote_record import fetch_record
from exact_resume.checkpoint.retention import best_steps
from exact_resume.checkpoint.store import NoValidCheckpointError
from exact_resume.resume import ResumePoint, ResumeRefusedError
from exact_resume.run import Run

if TYPE_CHECKING:
    from exact_resume.callbacks.checkpoint import Checkpoint

FINISH_SECONDS = 1800.0  # to wait for the last copies at the end of training
PATIENCE = 60.0  # seconds of it, while the place cannot be used
LEAVE_SECONDS = 15.0  # to wait after a signal

log = logging.getLogger(__name__)


class SecondCopy:
    """The second copy of ``run``; the caller holds the run's lock.

    Args:
        run: the run's directory.
        url: where the second copy goes, as in ``Remote``.
        name: of the run, as in ``Remote``.

    Raises:
        ValueError: the URL cannot be used; the message says why.
    """

    def __init__(self, run: Run, url: str, name: str = "") -> None:
        self.run = run
        self.remote = Remote(url, name)
        self.copier = Copier(self.remote, run.home, run.store)
        self.there: list[int] | None = None  # steps at the start; None while it cannot be seen
        self.has_left = False

    def fetch_newest(self, *, fresh: bool) -> None:
        """Fetch the newest checkpoint that verifies, if it is newer than those here.

        Args:
            fresh: whether the run is to be started afresh, by a person with ``ckpt_path=null``.

        Raises:
            ResumeRefusedError: a fresh start would replace the run in the second copy.
            NoValidCheckpointError: there are checkpoints, and none verifies, here or there.
            RemoteUnavailableError: nothing is here, and the second copy cannot be seen; or a newer
                checkpoint is there and cannot be fetched now.
        """
        here = self._newest_here()
        try:
            self.there = retry(self.remote.steps) if here < 0 else self.remote.steps()
        except RemoteUnavailableError as error:
            if here < 0:
                raise type(error)(
                    f"{error}. There may be a run to continue, so none is started; nothing was "
                    f"changed"
                ) from None
            log.warning(f"{error}. The run goes on from its own checkpoints, and is copied later")
            return
        if fresh:
            if self.there:
                raise ResumeRefusedError(
                    f"ckpt_path=null starts afresh, but the second copy in {self.remote.url} has "
                    f"checkpoints up to step {self.there[-1]}. Continue with ckpt_path=auto, or "
                    f"give the new run another name"
                )
            return
        newer = [step for step in reversed(self.there) if step > here]
        for step in newer:
            what = f"is at step {here}" if here >= 0 else "has no checkpoint"
            say(f"{self.run.home} {what}; fetching step {step} from {self.remote.url}")
            if fetch_step(self.remote, step, self.run.store, self._fetch_record):
                return
        if newer and here < 0:
            raise NoValidCheckpointError(
                f"no checkpoint of the second copy in {self.remote.url} verifies. To start over, "
                f"give the run another name"
            )

    def fetch_named(
        self, word: str | None, scores: Mapping[int, float], *, monitor: str, mode: str
    ) -> None:
        """Fetch the checkpoint that ``word``, a step or ``best``, means, if it is only there.

        Args:
            word: of ``ckpt_path``.
            scores: by step, as far as the run knows them.
            monitor: the metric of the scores.
            mode: ``min`` or ``max``.

        Raises:
            ResumeRefusedError: it does not verify.
            RemoteUnavailableError: it cannot be fetched now.
        """
        store = self.run.store
        here = store.steps()
        there = self.there or []
        named = re.fullmatch(r"(?:step-)?(\d+)", word or "")
        if named and int(named[1]) in there and int(named[1]) not in here:
            if not fetch_step(self.remote, int(named[1]), store):
                raise ResumeRefusedError(
                    f"ckpt_path={word} does not verify in {self.remote.url}. Choose another one"
                )
        if word == "best":
            known = {**self._scores_of(there, monitor), **scores}
            steps = {*here, *there}
            for step in best_steps(steps, known, mode=mode, n=len(steps)):
                if step in here or fetch_step(self.remote, step, store):
                    return

    def enter(self, point: ResumePoint | None) -> None:
        """Own the second copy, and put aside there what a resume at ``point`` goes back behind.

        Call it before ``Run.archive_newer``, so that a kill between them leaves the newer
        checkpoints here, where the next start finds them.

        Raises:
            RemoteUnavailableError: it cannot be done now, and must not be left out.
        """
        last = self.run.branch_step(point)
        goes_back = any(step > last for step in self.run.store.steps())
        if self.copier.is_claimed and not goes_back:
            return
        try:
            if self.there is None and goes_back:
                self.there = self.remote.steps()
            if self.there is None:
                return  # the copier claims it, once it can be seen
            if not self.copier.is_claimed:
                self._claim()
            # Also what the owner before has copied since this start has looked.
            if steps := retry(lambda: self.remote.abandon_newer(last)):
                log.info(f"in {self.remote.url} these were moved to abandoned/: {steps}")
        except RemoteUnavailableError as error:
            if point is None or goes_back or max(self.there or [-1]) > last:
                raise
            log.warning(f"{error}. The run goes on, and is copied later")

    def start(self, checkpoint: "Checkpoint") -> None:
        """Copy from now on, and keep there what ``checkpoint`` keeps here."""
        log.info(f"a second copy goes to {self.remote.url}")
        self.copier.keep = checkpoint.kept_steps
        self.copier.monitor = checkpoint.monitor or ""
        checkpoint.copier = self.copier
        self.copier.start()

    def finish(self, stop: Callable[[], bool] = lambda: False) -> None:
        """Wait until the last checkpoint is copied; give up with a line if that is hopeless.

        Args:
            stop: asked now and then whether to wait no longer than after a signal.

        Raises:
            LostOwnershipError: a newer start copies there.
        """
        self.copier.wake()
        if not self.copier.wait(1, patience=1, stop=stop):
            say(f"waiting for the second copy in {self.remote.url}")
        self.copier.wait(FINISH_SECONDS, patience=PATIENCE, stop=stop)
        self.leave()

    def leave(self) -> None:
        """Wait a moment for the last copy, say what is there, and stop copying.

        Raises:
            LostOwnershipError: a newer start copies there.
        """
        if self.has_left or self.copier.thread is None:
            return
        self.has_left = True
        self.copier.wake()
        is_whole = self.copier.wait(
            LEAVE_SECONDS, patience=LEAVE_SECONDS, stop=lambda: self.copier.failures > 1
        )
        self.copier.close()
        self.copier.check()
        newest = self.copier.newest
        there = f"the newest there is step {newest}" if newest >= 0 else "no checkpoint is there"
        state = "is complete" if is_whole else "is behind, and is completed at the next start"
        say(f"the second copy in {self.remote.url} {state}: {there}")

    def complete(self) -> None:
        """Copy what a finished run has not copied, and return when it is there."""
        here = self.run.newest_step()
        if self.there is not None and here not in self.there:
            self.copier.start()
            self.finish()

    def _newest_here(self) -> int:
        """Return the step of the newest checkpoint here that verifies, or -1."""
        try:
            manifest = self.run.store.last(quarantine=True)
        except NoValidCheckpointError:
            return -1
        return int(manifest["step"]) if manifest else -1

    def _fetch_record(self) -> None:
        retry(lambda: fetch_record(self.remote, self.run.home))
        self.run.metrics.reload()

    def _scores_of(self, steps: list[int], monitor: str) -> dict[int, float]:
        found = {step: self.remote.score(step, monitor) for step in steps}
        return {step: score for step, score in found.items() if score is not None}

    def _claim(self) -> None:
        """Own the second copy, and say who did before on another machine."""
        owner = retry(self.remote.claim)
        self.copier.is_claimed = True
        if owner and owner.get("host") != socket.gethostname():
            say(
                f"the last to copy to {self.remote.url} was {describe_owner(owner)}; if it still "
                f"trains, it stops now"
            )


def say(line: str) -> None:
    """Log a line, or print it where no log is configured yet."""
    if log.hasHandlers():
        log.info(line)
    else:
        print(line, flush=True)
