"""Every way out saves: after a signal at the end of the step, and after an error that came between
two steps.
"""

import logging
import signal
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from exact_resume import distributed
from exact_resume.callbacks.checkpoint import Checkpoint
from exact_resume.failures import FATAL_ERRORS
from exact_resume.signals import EXIT_INTERRUPTED, PreemptedError, Preemption

log = logging.getLogger(__name__)


class AgreeOnSignal(Callback):
    """Agrees with the other processes, after each step, on whether one has heard a signal.

    It stands before the watchdog, so that the limit of the step holds while it waits for the
    others.
    """

    def __init__(self, preemption: Preemption) -> None:
        self.preemption = preemption

    def on_train_batch_end(self, *args: Any) -> None:
        self.preemption.agreed = distributed.all_reduce_max(self.preemption.signal or 0)


class SaveOnSignal(Callback):
    """Leaves when ``AgreeOnSignal`` says so; to stand before callbacks that take their time after a
    step.

    What is then missing of the last step, its validation or its grid, is made at the next start.
    """

    def __init__(self, preemption: Preemption) -> None:
        self.preemption = preemption
        self.entered = self.done = (
            0  # the step that the training entered at, and the last one that it has done
        )

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.entered = self.done = trainer.global_step
        if not self.preemption.in_main_thread and distributed.rank() == 0:
            log.warning("training is not in the main thread, so signals are not heard: save often")
        self.preemption.install(training=True)
        if hasattr(pl_module, "ema"):
            pl_module.ema.model.backbone.register_forward_pre_hook(
                lambda *_: self.leave(trainer, distributed.all_reduce_max(self.preemption.signal or 0))
            )

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.done = trainer.global_step
        self.leave(trainer, self.preemption.agreed)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Save the last step, if its weights are good: not in the middle of a step, and not what
        has diverged.

        Several processes save together or not at all, and one that fails must not wait for the
        others.
        """
        on_purpose = isinstance(exception, (PreemptedError, *FATAL_ERRORS))
        at_once = isinstance(exception, SystemExit) and exception.code == EXIT_INTERRUPTED
        batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        in_step = batches.started != batches.processed or trainer.global_step != self.done
        if (
            on_purpose
            or at_once
            or in_step
            or self.done == self.entered
            or distributed.world_size() > 1
        ):
            return
        try:
            save(trainer)
        except Exception as error:  # whatever ended the training is told, and not this
            log.warning(f"step {trainer.global_step} is not saved: {type(error).__name__}: {error}")
        else:
            log.info(f"{type(exception).__name__}: saved step {trainer.global_step}")

    def leave(self, trainer: L.Trainer, number: int) -> None:
        """Save and raise ``PreemptedError`` if ``number`` is that of a signal."""
        if number:
            save(trainer)
            raise PreemptedError(f"{signal.Signals(number).name}: saved step {trainer.global_step}")


def save(trainer: L.Trainer) -> None:
    """Save the last step, wherever the training is after it."""
    loop: Any = trainer.fit_loop.epoch_loop
    for batches in (loop.batch_progress.total, loop.batch_progress.current):
        batches.ready = batches.started  # one that was fetched and not computed comes again
    loop.val_loop.batch_progress.reset()  # a validation begins again, with all its batches
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, Checkpoint):
            callback.save(trainer)
