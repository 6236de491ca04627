"""After a signal: save at the end of the step, then leave by raising ``Preempted``."""

import signal
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from sturdy.resume import world
from sturdy.resume.preemption import Preempted, Preemption
from sturdy.training.callbacks.checkpoint import Checkpoint


class Preempt(Callback):
    """Leaves when ``preemption`` heard a signal; to stand before callbacks that take their time after a step."""

    def __init__(self, preemption: Preemption | None = None) -> None:
        self.preemption = preemption or Preemption()

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.preemption.listen(training=True)
        # Only validation and sampling evaluate the average, and between two steps: it can be left at any layer.
        pl_module.ema.model.backbone.register_forward_pre_hook(lambda *_: self.leave(trainer))

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.leave(trainer)

    def leave(self, trainer: L.Trainer) -> None:
        """Save and raise ``Preempted`` if any process has heard a signal, unless only the end is left to do."""
        if trainer.global_step >= trainer.max_steps or not (number := world.heard(self.preemption.signal or 0)):
            return
        trainer.fit_loop.epoch_loop.val_loop.batch_progress.reset()  # a validation begins again, with all its batches
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, Checkpoint):
                callback.save(trainer)
        raise Preempted(f"{signal.Signals(number).name}: saved step {trainer.global_step}")
