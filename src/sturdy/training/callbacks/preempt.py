"""After a signal: save at the end of the step, then leave by raising ``Preempted``."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from sturdy.resume.preemption import Preempted, Preemption
from sturdy.training.callbacks.checkpoint import Checkpoint


class Preempt(Callback):
    """Listens for signals while training runs; ``preemption.signal`` tells which one was heard."""

    def __init__(self) -> None:
        self.preemption = Preemption()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.preemption.listen()

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if self.preemption.signal is None or trainer.global_step >= trainer.max_steps:
            return
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, Checkpoint):
                callback.save(trainer)
        raise Preempted(f"{self.preemption.signal.name}: saved step {trainer.global_step}")
