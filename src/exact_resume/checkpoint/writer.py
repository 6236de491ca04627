"""Lightning's saves and loads, carried out by the store; inside ``with``, while training goes on.

    training:   copy the state into host buffers, go on         (one memory copy)
    writer:     commit the copy to the store, then delete what need not be kept

At most one save is being written and one waits for it. A third waits for the first to be durable,
and training with
it: no checkpoint that was asked for is left out, and memory is bounded by two copies. A copy is
    allocated once, by the
writer too, because touching new memory takes longer than copying; and reused. An error that may
pass (a full or failing disk) is tried again, aloud; then it stops the training at its next step.
``with`` is never left before the last save is durable.
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

from exact_resume.checkpoint.store import Store, assert_primitive, load_state
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
RETRY_DELAYS = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds between attempts


class SaveError(Exception):
    """A checkpoint could not be written; the older ones are whole."""


class HostBuffers:
    """Host memory for one copy of a state, allocated once: tensors of one shape, type and layout
    are taken in turn.
    """

    def __init__(self) -> None:
        self.pool: dict[Any, list[Tensor]] = {}

    def reserve(self, state: Any) -> None:
        """Allocate what ``copy`` will need, and touch it.

        Without torch, whose first parallel loop in a second thread starts a second team of OpenMP
            threads: libgomp then
        takes the cores for oversubscribed and lets training's own threads sleep between loops,
        which halves its speed.
        """

        def touch(value: Tensor, buffer: Tensor) -> Tensor:
            memory = buffer.untyped_storage()
            ctypes.memset(memory.data_ptr(), 0, memory.nbytes())
            return buffer

        self._fill(state, touch)

    def copy(self, state: Any) -> Any:
        """``state`` with its tensors copied, complete when this returns; valid until the next
        ``copy``.
        """
        copy = self._fill(
            state, lambda value, buffer: buffer.copy_(value.detach(), non_blocking=value.is_cuda)
        )
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
        return copy

    def _fill(self, state: Any, fill: Callable[[Tensor, Tensor], Tensor]) -> Any:
        taken: Counter[Any] = Counter()

        def filled(value: Any) -> Any:
            if isinstance(value, Tensor):
                kind = (value.dtype, value.shape, value.stride(), value.is_cuda)
                buffers = self.pool.setdefault(kind, [])
                if taken[kind] == len(
                    buffers
                ):  # the layout stays: loaded optimizer state is used in the one it has
                    buffers.append(
                        torch.empty_like(
                            value, device="cpu", pin_memory=value.is_cuda, requires_grad=False
                        )
                    )
                taken[kind] += 1
                return fill(value, buffers[taken[kind] - 1])
            if isinstance(value, Mapping):
                return {k: filled(v) for k, v in value.items()}
            if isinstance(value, list | tuple | set):
                return type(value)([filled(v) for v in value])
            return value

        return filled(state)


class StoreCheckpointIO(CheckpointIO):
    """A CheckpointIO plugin on ``store``. Inside ``with`` it saves in the background, outside
    before it returns.

    Args:
        facts: what goes into the manifest of a checkpoint beside its step (position, fingerprint).
        pauses: seconds before each further attempt of a save that failed for a reason that may
            pass.

    Attributes:
        before_commit, after_commit: called by the writer, before and after each save.
    """

    def __init__(
        self,
        store: Store,
        facts: Callable[[Mapping[str, Any]], Mapping[str, Any]],
        *,
        pauses: Sequence[float] = RETRY_DELAYS,
    ) -> None:
        self.store, self.facts, self.pauses = store, facts, pauses
        self.before_commit: Callable[[], None] = lambda: None
        self.after_commit: Callable[[], None] = lambda: None
        self.free: queue.LifoQueue[HostBuffers] = (
            queue.LifoQueue()
        )  # the second are used, and allocated, if a save waits
        for _ in range(2):
            self.free.put(HostBuffers())
        self.asked: queue.SimpleQueue[tuple[HostBuffers, Callable[[], object]] | None] = (
            queue.SimpleQueue()
        )
        self.error: Exception | None = None
        self.thread: threading.Thread | None = None

    def reserve(self, state: Any) -> None:
        """Let the writer allocate memory for tensors like those in ``state``, so that no save waits
        for that.
        """
        if self.thread:
            buffers = self.free.get()
            self.asked.put((buffers, partial(buffers.reserve, state)))

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Take a copy of ``checkpoint``, to be committed under its step.

        Raises:
            TypeError: if anything in it is neither a tensor nor a primitive.
            SaveError: if an earlier save failed.
            OSError: outside ``with``, if this one fails.
        """
        step = checkpoint["global_step"]
        if Path(path) != self.store.state(step):
            raise ValueError(
                f"a checkpoint of step {step} belongs at {self.store.state(step)}, not at {path}"
            )
        assert_primitive(checkpoint, "the checkpoint")
        facts = dict(self.facts(checkpoint))
        if self.thread is None:
            return self._save(checkpoint, facts)
        buffers = self.free.get()  # here a third save waits
        try:
            self.check()
            self.asked.put((buffers, partial(self._save, buffers.copy(checkpoint), facts)))
        except BaseException:
            self.free.put(buffers)
            raise

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Tensors and primitives only, whatever ``weights_only`` says; the entry was verified
        before.
        """
        return load_state(Path(path), map_location or "cpu")

    def remove_checkpoint(self, path: Any) -> None:
        """Deleting is the store's (``Store.prune``), and never a side effect of a save."""

    def check(self) -> None:
        """Raise what went wrong in the writer; to be called every step, it costs nothing."""
        if self.error:
            raise SaveError(
                f"a checkpoint could not be written: {self.error}. The older ones in "
                f"{self.store.directory} are whole; "
                f"mend the cause and run the same command again"
            ) from self.error

    def close(self) -> None:
        """Return when every save asked for is durable.

        Raises:
            SaveError: if one is not.
        """
        if self.thread:
            self.asked.put(None)
            self.thread.join()
            self.thread = None
        self.check()

    def __enter__(self) -> "StoreCheckpointIO":
        self.thread = threading.Thread(target=self._write, name="checkpoint writer", daemon=True)
        self.thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        try:
            if isinstance(error, SystemExit) and error.code == EXIT_INTERRUPTED:
                raise error
            self.close()
        except SystemExit as told:  # to stop at once, before or while it waited
            if self.free.qsize() < 2:
                _exit(told.code)
            raise
        except SaveError:
            if not isinstance(
                error, Exception
            ):  # else that is what stopped the training, and this was logged
                raise

    def _write(self) -> None:
        while (job := self.asked.get()) is not None:
            buffers, action = job
            try:
                if self.error is None:
                    action()
            except Exception as error:  # told at training's next step
                self.error = error
            self.free.put(buffers)

    def _save(self, state: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        step = state["global_step"]
        for attempt, pause in enumerate((*self.pauses, None)):
            try:
                self.before_commit()
                if attempt and step in self.store.steps():
                    fsync_directory(
                        self.store.directory
                    )  # it was renamed, but its name was not durable
                else:
                    self.store.commit(step, state, **facts)
                break
            except Exception as error:
                cause = next((e for e in _chain(error) if isinstance(e, OSError)), error)
                if pause is None or getattr(cause, "errno", None) not in TRANSIENT_ERRNOS:
                    log.error("saving step %d failed: %s", step, cause)
                    raise cause from None
                log.warning("saving step %d failed: %s; trying again in %g s", step, cause, pause)
                time.sleep(pause)
        try:
            self.after_commit()
        except OSError as error:
            log.warning(
                "step %d is saved, but what need not be kept could not be deleted: %s", step, error
            )


def _exit(code: Any) -> None:
    """End the process without the interpreter's end, which a thread inside torch.save turns into an
    abort.
    """
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code if isinstance(code, int) else bool(code))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """``error`` and those it came from: torch buries what the disk said under an error of its
    own.
    """
    while error:
        yield error
        error = error.__cause__ or error.__context__
