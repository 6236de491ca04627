"""Writes what the steps and validations measured into ``metrics.csv`` and, row by row, into its
mirrors.

Values stay tensors on the device until ``trainer.log_every_n_steps`` steps are together, so that no
step waits for the one before it; they are all written before a checkpoint of their step is.
"""

import time
from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from exact_resume import distributed
from exact_resume.checkpoint.writer import SaveError
from exact_resume.metrics import MetricsCSV, format_value
from exact_resume.replay import ReplayLogger, recorded_rows


class Record(Callback):
    """Records every step's ``train/*`` and every validation's ``val/*`` under the number of steps
    done.

    Args:
        file: ``metrics.csv``; the other loggers get its rows as they are read back from it.
    """

    def __init__(self, file: MetricsCSV) -> None:
        self.file = file
        self.pending: list[tuple[int, dict[str, Any]]] = []
        self.images, self.since = 0, 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Fill up the mirrors; a validation that a kill interrupted is run again, so that no row is
        missing.
        """
        step, every = trainer.global_step, trainer.val_check_interval

        def begin() -> bool:
            self.file.cut(step)  # a run killed before its first checkpoint left rows, too
            rows, pictures = recorded_rows(self.file.path.parent, step)
            for mirror in trainer.loggers:
                if isinstance(mirror, ReplayLogger):
                    mirror.refill(rows, pictures)
            return step not in self.file.column("val/loss")

        if distributed.run_on_rank_zero(begin) and step and step % int(every) == 0:
            _validate(trainer)
        self.since = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self.pending.append((trainer.global_step, outputs))
        self.images += len(batch[0]) * trainer.world_size
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.flush(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.flush(trainer)
        values = {k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        self.write(trainer, trainer.global_step, values)
        self.since, self.images = time.perf_counter(), 0

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: Any
    ) -> None:
        self.flush(trainer)  # and the writer makes them durable before the checkpoint is

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.flush(trainer)

    def flush(self, trainer: L.Trainer) -> None:
        """Write the pending rows; the last one carries the throughput since the flush before."""
        if not self.pending:
            return
        *_, (last, _) = self.pending
        for step, outputs in self.pending:
            scalars = outputs if isinstance(outputs, Mapping) else {"loss": outputs}
            values = {f"train/{k}": float(v) for k, v in scalars.items()}
            if step == last:
                values["train/images_per_second"] = self.images / (time.perf_counter() - self.since)
            self.write(trainer, step, values)
        self.pending, self.images, self.since = [], 0, time.perf_counter()

    def write(self, trainer: L.Trainer, step: int, values: Mapping[str, float]) -> None:
        """Write one row; rounded first, so that a mirror filled up from the file holds the same."""
        values = {k: float(format_value(v)) for k, v in values.items()}
        for logger in trainer.loggers if trainer.is_global_zero else ():  # the file is one of them
            try:
                logger.log_metrics(values, step)
            # only the file raises; without the record there must be no later checkpoint
            except OSError as error:
                raise SaveError(
                    f"{self.file.path} could not be written: {error}. Mend that and run the same "
                    f"command again"
                ) from error


def _validate(trainer: L.Trainer) -> None:
    """Run the validation loop now, between two steps."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.restarting = False
    trainer.validating = True
    loop.run()
    trainer.training = True
