"""Errors that do not end a run."""

import logging
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

import torch

from exact_resume.checkpoint.writer import SaveError
from exact_resume.distributed import PeerLostError
from exact_resume.skips import NonFiniteLossError

log = logging.getLogger(__name__)
T = TypeVar("T")

# Raised on purpose, to end the training or to send it back.
FATAL_ERRORS = (NonFiniteLossError, SaveError, PeerLostError, FloatingPointError)

# What the Trainer calls of a logger, and of a callback that only shows something.
TOLERATED_HOOKS = (
    *("log_hyperparams", "log_metrics", "log_image", "log_graph", "save", "finalize"),
    *("on_train_start", "on_train_batch_end", "on_validation_end", "on_train_end", "on_exception"),
)

# Parts of the message of errors that have no type of their own.
OUT_OF_MEMORY_MESSAGES = (
    "DefaultCPUAllocator",
    "_ALLOC_FAILED",
    "out of shared memory",
    "killed by signal: Killed",
)


class OutOfMemoryError(Exception):
    """There is not enough memory; the message says which settings need less."""


class ToleratedErrors:
    """A context whose errors do not end the training; of equal ones in a row, the first is a
    warning in the log.

    Errors that end the training on purpose (``FATAL_ERRORS``) are raised, and so is a lack of
    memory.

    Args:
        what: fails, ``"the grid of samples"``.
    """

    def __init__(self, what: str) -> None:
        self.what, self.said = what, ""

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        if (
            not isinstance(error, Exception)
            or isinstance(error, FATAL_ERRORS)
            or is_out_of_memory(error)
        ):
            return False
        why = f"{type(error).__name__}: {error}"
        if why != self.said:
            self.said = why
            log.warning(f"{self.what} failed, and training goes on: {why}")
            log.debug("where it failed", exc_info=error)
        return True


def tolerate_errors(owner: T) -> T:
    """Make what a logger or a callback does during training end no run; after an error it does
    nothing more.
    """
    spared = ToleratedErrors(f"{type(owner).__name__}, which is not called again,")

    def wrap(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not spared.said:
                with spared:
                    return method(*args, **kwargs)

        return call

    for name in TOLERATED_HOOKS:
        if hasattr(owner, name):
            setattr(owner, name, wrap(getattr(owner, name)))
    return owner


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` tells that memory is short, on a device or on the host."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        word in str(error) for word in OUT_OF_MEMORY_MESSAGES
    )
