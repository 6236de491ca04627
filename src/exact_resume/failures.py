"""Which errors end a run, and which do not."""

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

# Raised on purpose, to end the training or to roll it back.
FATAL_ERRORS = (NonFiniteLossError, SaveError, PeerLostError, FloatingPointError)

# The methods that the Trainer calls on a logger, or on a callback that only displays something.
TOLERATED_HOOKS = (
    "log_hyperparams",
    "log_metrics",
    "log_image",
    "log_graph",
    "save",
    "finalize",
    "on_train_start",
    "on_train_batch_end",
    "on_validation_end",
    "on_train_end",
    "on_exception",
)

# Parts of the messages of errors that have no type of their own.
OUT_OF_MEMORY_MESSAGES = (
    "DefaultCPUAllocator",
    "_ALLOC_FAILED",
    "out of shared memory",
    "killed by signal: Killed",
)


class ToleratedErrors:
    """A context whose errors do not end the training; an error is logged once.

    Errors in ``FATAL_ERRORS`` and a lack of memory are raised.

    Args:
        what: the thing that fails, for the message: ``"the grid of samples"``.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.last_error = ""

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        if not isinstance(error, Exception) or isinstance(error, FATAL_ERRORS):
            return False
        if is_out_of_memory(error):
            return False
        message = f"{type(error).__name__}: {error}"
        if message != self.last_error:
            self.last_error = message
            log.warning(f"{self.what} failed, and training goes on: {message}")
            log.debug("where it failed", exc_info=error)
        return True


def tolerate_errors(owner: T) -> T:
    """Let no error of a logger or a callback end the run; after an error it is not called again."""
    tolerated = ToleratedErrors(f"{type(owner).__name__}, which is not called again,")

    def wrap(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not tolerated.last_error:
                with tolerated:
                    return method(*args, **kwargs)

        return call

    for name in TOLERATED_HOOKS:
        if hasattr(owner, name):
            setattr(owner, name, wrap(getattr(owner, name)))
    return owner


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether ``error`` says that memory is short, on a device or on the host."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(part in str(error) for part in OUT_OF_MEMORY_MESSAGES)
