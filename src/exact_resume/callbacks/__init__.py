"""Callbacks for any LightningModule; they need no attribute of a module but Lightning's own."""

from typing import Any, Protocol, runtime_checkable

import lightning as L


@runtime_checkable
class BeforeEvaluation(Protocol):
    """A callback that must look at the training before its weights are used."""

    def before_evaluation(self, trainer: L.Trainer) -> None:
        """Raise an exception if the weights must not be evaluated now."""


def before_evaluation(trainer: L.Trainer) -> None:
    """Let all callbacks look before weights are used outside of Lightning's own loops.

    Whoever samples or exports during training calls it before each use, on all ranks together. So
    nothing that is not finite is used, and a signal is honoured between two uses.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, BeforeEvaluation):
            callback.before_evaluation(trainer)
