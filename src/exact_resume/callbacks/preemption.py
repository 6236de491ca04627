"""Save on every way out: after a signal, and after an error between two steps."""

import logging
import signal
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from exact_resume import distributed
from exact_resume.callbacks.checkpoint import Checkpoint
from exact_resume.failures import FATAL_ERRORS
from exact_resume.lightning_internals import (
    is_in_step,
    keep_data_workers,
    reset_batch_progress,
)
from exact_resume.signals import EXIT_INTERRUPTED, PreemptedError, Preemption

log = logging.getLogger(__name__)


class AgreeOnSignal(Callback):
    """Agrees with the other processes after each step whether one has received a signal.

    It stands before the watchdog, so that the limit of the step holds while it waits for others.
    """

    def __init__(self, preemption: Preemption) -> None:
        self.preemption = preemption

    @override
    def on_train_start(self, *args: Any) -> None:
        distributed.keep_connections_alive()  # those that the strategy has opened, too

    @override
    def on_train_batch_end(self, *args: Any) -> None:
        self.preemption.agreed = distributed.all_reduce_max(self.preemption.signal or 0)


class SaveOnSignal(Callback):
    """Saves and raises ``PreemptedError`` after a signal.

    It stands before callbacks that take their time after a step. What is then missing of the last
    step, such as its validation, is made at the next start.
    """

    def __init__(self, preemption: Preemption) -> None:
        self.preemption = preemption
        self.first_step = 0  # where this training began
        self.last_step = 0  # the last step that is done

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        keep_data_workers(trainer)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.first_step = trainer.global_step
        self.last_step = trainer.global_step
        if not self.preemption.in_main_thread and distributed.rank() == 0:
            log.warning("training is not in the main thread, so signals are not heard: save often")
        self.preemption.install(training=True)

    @override
    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.last_step = trainer.global_step
        self.leave(trainer, self.preemption.agreed)

    @override
    def on_validation_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        self.before_evaluation(trainer)

    def before_evaluation(self, trainer: L.Trainer) -> None:
        """Leave between two evaluations, if any process has received a signal."""
        self.leave(trainer, distributed.all_reduce_max(self.preemption.signal or 0))

    @override
    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Save the last step if its weights are good: neither inside a step, nor if it diverged.

        Several processes save together or not at all, and one that fails must not wait for others.
        """
        is_deliberate = isinstance(exception, (PreemptedError, *FATAL_ERRORS))
        at_once = isinstance(exception, SystemExit) and exception.code == EXIT_INTERRUPTED
        in_step = is_in_step(trainer) or trainer.global_step != self.last_step
        nothing_done = self.last_step == self.first_step
        several = distributed.world_size() > 1
        if is_deliberate or at_once or in_step or nothing_done or several:
            return
        try:
            save(trainer)
        except Exception as error:  # the error that ended the training is the one to report
            step = trainer.global_step
            log.warning(f"step {step} is not saved: {type(error).__name__}: {error}")
        else:
            log.info(f"{type(exception).__name__}: saved step {trainer.global_step}")

    def leave(self, trainer: L.Trainer, number: int) -> None:
        """Save and raise ``PreemptedError`` if ``number`` is that of a signal."""
        if number:
            save(trainer)
            name = signal.Signals(number).name
            raise PreemptedError(f"{name}: saved step {trainer.global_step}")


def save(trainer: L.Trainer) -> None:
    """Save the last step, at any place after it."""
    reset_batch_progress(trainer)
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, Checkpoint):
            callback.save(trainer)
