"""Save and load Lightning's checkpoints in a store, in the background while training continues.

    training:       copy the state into host buffers, continue       (one copy in memory)
    writer thread:  commit the copy to the store, then delete old checkpoints

At most one save is being written while one waits. A third waits until the first is durable, and
training waits with it: every save is made, and memory is bounded by two copies. An error that may
pass, such as a full disk, is retried with a warning. Any other error, or the last retry, stops the
training at its next step. The ``with`` block ends when the last save is durable.
"""

import errno
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from lightning.fabric.plugins import CheckpointIO
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from exact_resume.checkpoint import schema
from exact_resume.checkpoint.host_buffers import HostBuffers
from exact_resume.checkpoint.integrity import CheckpointLoadError
from exact_resume.checkpoint.reading import load_state
from exact_resume.checkpoint.store import Store
from exact_resume.distributed import PeerLostError, rank
from exact_resume.files import fsync_directory
from exact_resume.signals import EXIT_INTERRUPTED

if TYPE_CHECKING:
    from torch.distributed.checkpoint.planner import SavePlan

log = logging.getLogger(__name__)

TRANSIENT_ERRNOS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EIO,
    errno.ESTALE,
    errno.EAGAIN,
    errno.EBUSY,
    errno.ETIMEDOUT,
}
RETRY_DELAYS = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before each further attempt


class SaveError(Exception):
    """A checkpoint could not be written; the older ones are intact."""


class StoreCheckpointIO(CheckpointIO):
    """A CheckpointIO plugin for Lightning's Trainer that saves to a store.

    Inside ``with`` it saves in the background, outside it returns when the save is durable.

    Args:
        store: the checkpoints of the run.
        metadata: returns the entries of the manifest that the application adds (position,
            fingerprint); called with the content of the checkpoint.
        retry_delays: seconds before each further attempt of a save that failed for a reason that
            may pass.

    Attributes:
        before_commit: called by the writer before each save.
        after_commit: called by the writer after each save.
        sharded: whether a strategy that cuts tensors over processes gives each process its pieces
            to save, and not all tensors to process 0. Then every process must call
            ``save_checkpoint``.
    """

    def __init__(
        self,
        store: Store,
        metadata: Callable[[Mapping[str, Any]], Mapping[str, Any]],
        *,
        retry_delays: Sequence[float] = RETRY_DELAYS,
    ) -> None:
        self.store = store
        self.metadata = metadata
        self.retry_delays = retry_delays
        self.before_commit: Callable[[], None] = lambda: None
        self.after_commit: Callable[[], None] = lambda: None
        self.sharded = False
        self.group: Any = None  # of the writers of all processes
        # Last in, first out: the second buffers are used, and allocated, only if a save waits.
        self.free_buffers: queue.LifoQueue[HostBuffers] = queue.LifoQueue()
        for _ in range(2):
            self.free_buffers.put(HostBuffers())
        self.queue: queue.SimpleQueue[tuple[HostBuffers, Callable[[], object]] | None] = (
            queue.SimpleQueue()
        )
        self.error: Exception | None = None
        self.thread: threading.Thread | None = None

    def preallocate(self, state: Any) -> None:
        """Let the writer allocate memory for the tensors in ``state`` before the first save."""
        if self.sharded:
            from exact_resume.checkpoint import sharded

            state, _ = sharded.split({"state": state})
        if self.thread:
            buffers = self.free_buffers.get()
            self.queue.put((buffers, partial(buffers.preallocate, state)))

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Copy ``checkpoint``, and commit the copy under its step.

        Raises:
            SchemaError: if an entry of it, or of its manifest, is not declared in the schema.
            TypeError: if anything in it is neither a tensor nor a primitive.
            SaveError: if an earlier save failed.
            PeerLostError: if it failed because another process is gone.
            OSError: outside ``with``, if this save fails.
        """
        step = checkpoint["global_step"]
        if Path(path) != self.store.state(step):
            raise ValueError(
                f"a checkpoint of step {step} belongs at {self.store.state(step)}, not at {path}"
            )
        state = checkpoint | {"format": schema.FORMAT}
        metadata = dict(self.metadata(checkpoint))
        schema.check_declared(state)
        schema.check_declared(metadata, schema.MANIFEST_ENTRIES)
        schema.assert_primitive(state, "the checkpoint")
        plan = None
        if self.sharded:
            from exact_resume.checkpoint import sharded  # torch.distributed takes time to import

            state, plan = sharded.split(state)
            if plan and self.group is None:
                self.group = sharded.new_group()
        if self.thread is None:
            self._save(state, metadata, plan)
            return
        buffers = self.free_buffers.get()  # a third save waits here
        try:
            self.check()
            self.queue.put((buffers, partial(self._save, buffers.copy(state), metadata, plan)))
        except BaseException:
            self.free_buffers.put(buffers)
            raise

    @override
    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Return a verified checkpoint: tensors and primitives, whatever ``weights_only`` says.

        Raises:
            CorruptCheckpointError: if it does not verify.
            CheckpointLoadError: if it holds anything else, or lacks an entry that is required to
                continue a run.
        """
        return self._load(Path(path), map_location or "cpu")

    def load_into(
        self, path: Path, model: nn.Module, optimizers: Sequence[Optimizer]
    ) -> dict[str, Any] | None:
        """Load a sharded checkpoint into a distributed model, each process its own pieces.

        Args:
            path: of the ``state.ckpt``.
            model: whose parameters are distributed.
            optimizers: of the model.

        Returns:
            what the checkpoint holds beside the weights; None if it is not sharded.

        Raises:
            CorruptCheckpointError, CheckpointLoadError: as ``load_checkpoint``; or if it is of
                another network.
        """
        if not any(path.parent.glob("part-*")):
            return None
        state = self._load(path, "cpu", whole=False)
        if schema.PARTS not in state:
            return None
        from exact_resume.checkpoint.resharding import load_into

        return load_into(path.parent, state, model, optimizers)

    @override
    def remove_checkpoint(self, path: Any) -> None:
        """Do nothing: only ``Store.prune`` deletes checkpoints, never a save."""

    def check(self) -> None:
        """Raise an error if the writer has failed. It costs nothing: call it every step.

        Raises:
            SaveError: with the reason.
            PeerLostError: if the reason is that another process is gone.
        """
        if isinstance(self.error, PeerLostError):
            raise self.error
        if self.error:
            raise SaveError(
                f"a checkpoint could not be written: {self.error}. The older ones in "
                f"{self.store.directory} are whole; mend the cause and run the same command again"
            ) from self.error

    def close(self) -> None:
        """Wait until every save is durable.

        Raises:
            SaveError: if one failed.
        """
        if self.thread:
            self.queue.put(None)
            self.thread.join()
            self.thread = None
        self.check()

    def __enter__(self) -> "StoreCheckpointIO":
        self.thread = threading.Thread(
            target=self._run_writer, name="checkpoint writer", daemon=True
        )
        self.thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if isinstance(error, SystemExit) and error.code == EXIT_INTERRUPTED:
                raise error
            self.close()
        except SystemExit as stop:  # a second Ctrl-C, before or during ``close``: do not wait
            if self.free_buffers.qsize() < 2:
                _exit_now(stop.code)
            raise
        except SaveError:
            # An error that stopped the training comes first; the failed save was logged.
            if not isinstance(error, Exception):
                raise

    def _run_writer(self) -> None:
        while (job := self.queue.get()) is not None:
            buffers, action = job
            try:
                if self.error is None:
                    action()
            except Exception as error:  # ``check`` raises it at the next step of training
                self.error = error
            self.free_buffers.put(buffers)

    def _load(self, path: Path, map_location: Any, *, whole: bool = True) -> dict[str, Any]:
        state = load_state(path, map_location, whole=whole)
        if missing := schema.missing_entries(state):
            raise CheckpointLoadError(
                f"{path} has no {', '.join(missing)}, so no run can continue from it"
            )
        return state

    def _save(
        self, state: Mapping[str, Any], metadata: Mapping[str, Any], plan: "SavePlan | None"
    ) -> None:
        step = state["global_step"]
        for attempt, delay in enumerate((*self.retry_delays, None)):
            try:
                if plan:
                    self._commit_sharded(step, state, metadata, plan, is_retry=attempt > 0)
                else:
                    self.before_commit()
                    if not (attempt and self._sync_renamed(step)):
                        self.store.commit(step, state, **metadata)
                break
            except Exception as error:
                cause = next((e for e in _causes(error) if isinstance(e, OSError)), error)
                if delay is None or getattr(cause, "errno", None) not in TRANSIENT_ERRNOS:
                    log.error("saving step %d failed: %s", step, cause)
                    raise cause from None
                log.warning("saving step %d failed: %s; trying again in %g s", step, cause, delay)
                time.sleep(delay)
        if rank():
            return
        try:
            self.after_commit()
        except OSError as error:
            log.warning("step %d is saved, but old files could not be deleted: %s", step, error)

    def _commit_sharded(
        self,
        step: int,
        state: Mapping[str, Any],
        metadata: Mapping[str, Any],
        plan: "SavePlan",
        *,
        is_retry: bool,
    ) -> None:
        """Commit with the other processes, which all do the same."""
        from exact_resume.checkpoint import sharded

        if is_retry and sharded.ask_process_zero(partial(self._sync_renamed, step), self.group):
            return
        sharded.commit(self.store, state, metadata, plan, self.group, self.before_commit)

    def _sync_renamed(self, step: int) -> bool:
        """Return whether ``step`` was renamed, and syncing the directory failed; sync it then."""
        renamed = step in self.store.steps()
        if renamed:
            fsync_directory(self.store.directory)
        return renamed


def _exit_now(code: Any) -> None:
    """End the process without the interpreter's cleanup, which aborts a thread in torch.save."""
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code if isinstance(code, int) else bool(code))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield ``error`` and the errors that caused it: torch hides the disk's behind its own."""
    while error:
        yield error
        error = error.__cause__ or error.__context__
