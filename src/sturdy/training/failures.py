"""Errors that end no run, and what helps against those that do."""

from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

import torch
from omegaconf import DictConfig

from sturdy.resume.skips import Diverged
from sturdy.resume.world import PeerLost
from sturdy.resume.writer import SaveFailed
from sturdy.training.attempt import CONSOLE

T = TypeVar("T")

# Raised on purpose, to end the training or to send it back.
ENDS = (Diverged, SaveFailed, PeerLost, FloatingPointError)

# What the Trainer calls of a logger, and of a callback that only shows something.
CALLED = (
    *("log_hyperparams", "log_metrics", "log_image", "log_graph", "save", "finalize"),
    *("on_train_start", "on_train_batch_end", "on_validation_end", "on_train_end", "on_exception"),
)

# Parts of the message of errors that have no type of their own.
SHORT = ("DefaultCPUAllocator", "_ALLOC_FAILED", "out of shared memory", "killed by signal: Killed")


class OutOfMemoryError(Exception):
    """There is not enough memory; the message says which settings need less."""


class Spared:
    """A context whose errors do not end the training; of equal ones in a row, the first is a warning in the log.

    Errors that end the training on purpose (``ENDS``) are raised, and so is a lack of memory.

    Args:
        what: fails, ``"the grid of samples"``.
    """

    def __init__(self, what: str) -> None:
        self.what, self.said = what, ""

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception) or isinstance(error, ENDS) or is_out_of_memory(error):
            return False
        why = f"{type(error).__name__}: {error}"
        if why != self.said:
            self.said = why
            CONSOLE.warning(f"{self.what} failed, and training goes on: {why}")
            CONSOLE.debug("where it failed", exc_info=error)
        return True


def spare(owner: T) -> T:
    """Make what a logger or a callback does during training end no run; after an error it does nothing more."""
    spared = Spared(f"{type(owner).__name__}, which is not called again,")

    def wrap(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not spared.said:
                with spared:
                    return method(*args, **kwargs)

        return call

    for name in CALLED:
        if hasattr(owner, name):
            setattr(owner, name, wrap(getattr(owner, name)))
    return owner


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` tells that memory is short, on a device or on the host."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(word in str(error) for word in SHORT)


def out_of_memory(error: BaseException, cfg: DictConfig) -> OutOfMemoryError:
    """What ``error`` says in a line, and which of the settings in ``cfg`` need less memory."""
    b, v = cfg.data.batch_size, cfg.data.shards or 1
    help = [
        f"data.shards={more} (now {v}) computes the batch in more and smaller parts, of the same samples"
        for more in [next((n for n in range(2 * v, b + 1, v) if b % n == 0), None)]
        if more
    ]
    if cfg.backbone.get("checkpoint") is False:
        help.append("backbone.checkpoint=true computes activations twice and keeps few")
    if cfg.data.num_workers:
        help.append(f"data.num_workers=0 (now {cfg.data.num_workers}) reads images without processes of their own")
    if cfg.callbacks.get("samples"):
        help.append(f"callbacks.samples.n (now {cfg.callbacks.samples.n}) is how many images are drawn at once")
    help.append(f"a smaller data.batch_size (now {b}) or backbone is another run")
    said = str(error).split("\n")[0] or type(error).__name__
    return OutOfMemoryError(f"out of memory: {said}\n    " + "\n    ".join(help))
