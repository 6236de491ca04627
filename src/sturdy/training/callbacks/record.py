"""Writes what the steps and validations measured into ``metrics.csv`` and the loggers that mirror it.

Values stay tensors on the device until ``trainer.log_every_n_steps`` steps are together, so that no step waits for the
one before it; they are all written before a checkpoint of their step is.
"""

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from sturdy.training.loggers.metrics_file import MetricsFile


class Record(Callback):
    """Records every step's ``train/*`` and every validation's ``val/*`` under the number of steps done.

    Args:
        file: ``metrics.csv``; cut back to the entered step before the run begins.
    """

    def __init__(self, file: MetricsFile) -> None:
        self.file = file
        self.pending: list[tuple[int, dict[str, Any]]] = []
        self.images, self.since = 0, 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A validation that a kill interrupted is run again, so that no row is missing."""
        step, every = trainer.global_step, trainer.val_check_interval
        if step and step % int(every) == 0 and step not in self.file.column("val/loss"):
            _validate(trainer)
        self.since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.pending.append((trainer.global_step, outputs))
        self.images += len(batch[0])
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.flush(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.flush(trainer)
        values = {k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        for logger in trainer.loggers:
            logger.log_metrics(values, trainer.global_step)
        self.since, self.images = time.perf_counter(), 0

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: Any) -> None:
        self.flush(trainer)
        self.file.sync()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.flush(trainer)

    def flush(self, trainer: L.Trainer) -> None:
        """Write the pending rows; the last one carries the throughput since the flush before."""
        if not self.pending:
            return
        *_, (last, _) = self.pending
        for step, outputs in self.pending:
            values = {f"train/{k}": float(v) for k, v in outputs.items()}
            if step == last:
                values["train/images_per_second"] = self.images / (time.perf_counter() - self.since)
            self.file.log_metrics(values, step)
            if step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
                for logger in trainer.loggers[1:]:
                    logger.log_metrics(values, step)
        self.pending, self.images, self.since = [], 0, time.perf_counter()


def _validate(trainer: L.Trainer) -> None:
    """Run the validation loop now, between two steps."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.restarting = False
    trainer.validating = True
    loop.run()
    trainer.training = True
