"""Save and load Lightning's checkpoints in a store, in the background while training continues.

    training:       copy the state into host buffers, continue       (one copy in memory)
    writer thread:  commit the copy to the store, then delete old checkpoints

At most one save is being written while one waits. A third waits until the first is durable, and
training waits with it: every save is made, and memory is bounded by two copies. An error that may
pass, such as a full disk, is retried with a warning. Any other error, or the last retry, stops the
training at its next step. The ``with`` block ends when the last save is durable.
"""

import ctypes
import errno
import logging
import os
import queue
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from torch import Tensor
from typing_extensions import override

from exact_resume.checkpoint import schema
from exact_resume.checkpoint.reading import CheckpointLoadError, load_state
from exact_resume.checkpoint.store import Store
from exact_resume.files import fsync_directory
from exact_resume.signals import EXIT_INTERRUPTED

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


class HostBuffers:
    """Host memory for one copy of a state.

    Buffers are allocated once and reused: touching new memory takes longer than copying. Tensors
    of one shape, type and layout take the buffers of this kind in turn.
    """

    def __init__(self) -> None:
        self.pool: dict[Any, list[Tensor]] = {}

    def preallocate(self, state: Any) -> None:
        """Allocate the memory that ``copy`` will need for ``state``, and touch it.

        It is touched by C and not by torch, whose first parallel loop in a second thread starts a
        second team of OpenMP threads. libgomp then believes that there are more threads than
        cores, and lets training's own threads sleep between loops, which halves its speed.
        """

        def touch(value: Tensor, buffer: Tensor) -> Tensor:
            memory = buffer.untyped_storage()
            ctypes.memset(memory.data_ptr(), 0, memory.nbytes())
            return buffer

        self._fill(state, touch)

    def copy(self, state: Any) -> Any:
        """Return ``state`` with its tensors copied; the copy is valid until the next ``copy``."""

        def copy_tensor(value: Tensor, buffer: Tensor) -> Tensor:
            return buffer.copy_(value.detach(), non_blocking=value.is_cuda)

        copy = self._fill(state, copy_tensor)
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.current_stream().synchronize()
        return copy

    def _fill(self, state: Any, fill: Callable[[Tensor, Tensor], Tensor]) -> Any:
        used: Counter[Any] = Counter()  # buffers by kind

        def filled(value: Any) -> Any:
            if isinstance(value, Tensor):
                # The layout matters: loaded optimizer state is used in the layout that it has.
                kind = (value.dtype, value.shape, value.stride(), value.is_cuda)
                buffers = self.pool.setdefault(kind, [])
                if used[kind] == len(buffers):
                    buffers.append(_empty_like(value))
                used[kind] += 1
                return fill(value, buffers[used[kind] - 1])
            if isinstance(value, Mapping):
                return {k: filled(v) for k, v in value.items()}
            if isinstance(value, list | tuple | set):
                return type(value)([filled(v) for v in value])
            return value

        return filled(state)


class StoreCheckpointIO(CheckpointIO):
    """A CheckpointIO plugin for Lightning's Trainer that saves to a store.

    Inside ``with`` it saves in the background, outside it returns when the save is durable.

    Args:
        store: the checkpoints of the run.
        metadata: returns the entries of the manifest that the application adds (position,
            fingerprint); called with the content of the checkpoint.
        retry_delays: seconds before each further attempt of a save that failed for a reason that
            may pass.
        check: called before each save; an error of it ends the training.

    Attributes:
        before_commit: called by the writer before each save.
        after_commit: called by the writer after each save.
    """

    def __init__(
        self,
        store: Store,
        metadata: Callable[[Mapping[str, Any]], Mapping[str, Any]],
        *,
        retry_delays: Sequence[float] = RETRY_DELAYS,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.check_before = check
        self.store = store
        self.metadata = metadata
        self.retry_delays = retry_delays
        self.before_commit: Callable[[], None] = lambda: None
        self.after_commit: Callable[[], None] = lambda: None
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
        if self.thread is None:
            self._save(state, metadata)
            return
        buffers = self.free_buffers.get()  # a third save waits here
        try:
            self.check()
            self.queue.put((buffers, partial(self._save, buffers.copy(state), metadata)))
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
        state = load_state(Path(path), map_location or "cpu")
        if missing := schema.missing_entries(state):
            raise CheckpointLoadError(
                f"{path} has no {', '.join(missing)}, so no run can continue from it"
            )
        return state

    @override
    def remove_checkpoint(self, path: Any) -> None:
        """Do nothing: only ``Store.prune`` deletes checkpoints, never a save."""

    def check(self) -> None:
        """Raise a SaveError if the writer has failed. It costs nothing: call it every step."""
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

    def _save(self, state: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
        step = state["global_step"]
        for attempt, delay in enumerate((*self.retry_delays, None)):
            try:
                self.check_before()
                self.before_commit()
                if attempt and step in self.store.steps():
                    # The rename was done, but syncing the directory failed.
                    fsync_directory(self.store.directory)
                else:
                    self.store.commit(step, state, **metadata)
                break
            except Exception as error:
                cause = next((e for e in _causes(error) if isinstance(e, OSError)), error)
                if delay is None or getattr(cause, "errno", None) not in TRANSIENT_ERRNOS:
                    log.error("saving step %d failed: %s", step, cause)
                    raise cause from None
                log.warning("saving step %d failed: %s; trying again in %g s", step, cause, delay)
                time.sleep(delay)
        try:
            self.after_commit()
        except OSError as error:
            log.warning("step %d is saved, but old files could not be deleted: %s", step, error)


def _empty_like(value: Tensor) -> Tensor:
    """Return uninitialized host memory for a copy of ``value``, pinned if that is on a GPU."""
    return torch.empty_like(value, device="cpu", pin_memory=value.is_cuda, requires_grad=False)


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
