"""Write what steps and validations measured into ``metrics.csv``, and row by row to other loggers.

Values stay tensors on the device until ``trainer.log_every_n_steps`` steps are together, so that no
step waits for the step before it. They are all written before a checkpoint of their step.
"""

import time
from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from exact_resume import distributed
from exact_resume.checkpoint.writer import SaveError
from exact_resume.lightning_internals import run_validation
from exact_resume.metrics import MetricsCSV, format_value
from exact_resume.replay import ReplayLogger, recorded_rows


class Record(Callback):
    """Records ``train/*`` of every step and ``val/*`` of every validation, by steps done.

    A training step returns its loss, or a mapping of scalars. A validation logs with ``self.log``.
    ``train/lr`` is the learning rate of the first group of parameters.

    Args:
        file: ``metrics.csv``; other loggers get its rows as they would be read from it.
        metric: the metric that says whether a step was validated.
    """

    def __init__(self, file: MetricsCSV, *, metric: str = "val/loss") -> None:
        self.file = file
        self.metric = metric
        self.pending: list[tuple[int, Any, Any]] = []  # step, outputs, learning rate
        self.rate: Any = None  # of the newest step
        self.samples = 0  # since the last row with a throughput
        self.since = 0.0

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Fill the other loggers, and run a validation again that a kill interrupted."""
        step = trainer.global_step
        every = trainer.val_check_interval

        def is_missing() -> bool:
            self.file.cut(step)  # a run killed before its first checkpoint left rows, too
            rows, images = recorded_rows(self.file.path.parent, step)
            for logger in trainer.loggers:
                if isinstance(logger, ReplayLogger):
                    logger.refill(rows, images)
            return step not in self.file.column(self.metric)

        missing = distributed.run_on_rank_zero(is_missing)
        if missing and step and step % int(every) == 0 and trainer.enable_validation:
            run_validation(trainer)
        self.since = time.perf_counter()

    @override
    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        """Note the learning rate of this step: afterwards a schedule has set that of the next."""
        if optimizer is trainer.optimizers[0]:
            rate = optimizer.param_groups[0].get("lr")
            self.rate = rate.clone() if isinstance(rate, Tensor) else rate

    @override
    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self.pending.append((trainer.global_step, outputs, self.rate))
        self.samples += _batch_size(batch) * trainer.world_size
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.flush(trainer)

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.flush(trainer)
        values = {}
        for name, value in trainer.callback_metrics.items():
            if name.startswith("val/"):
                values[name] = value.item()
        self.write(trainer, trainer.global_step, values)
        self.since = time.perf_counter()
        self.samples = 0

    @override
    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: Any
    ) -> None:
        self.flush(trainer)  # the writer makes the rows durable before the checkpoint

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.flush(trainer)

    def flush(self, trainer: L.Trainer) -> None:
        """Write the pending rows; the last one has the throughput since the last flush."""
        if not self.pending:
            return
        last = self.pending[-1][0]
        for step, outputs, rate in self.pending:
            scalars = outputs if isinstance(outputs, Mapping) else {"loss": outputs}
            values = {f"train/{name}": float(value) for name, value in scalars.items()}
            if rate is not None:
                values.setdefault("train/lr", float(rate))
            if step == last:
                seconds = time.perf_counter() - self.since
                values["train/images_per_second"] = self.samples / seconds
            self.write(trainer, step, values)
        self.pending = []
        self.samples = 0
        self.since = time.perf_counter()

    def write(self, trainer: L.Trainer, step: int, values: Mapping[str, float]) -> None:
        """Write one row on rank 0, rounded as in the file.

        Raises:
            SaveError: the file cannot be written; without its row there must be no later
                checkpoint.
        """
        if not trainer.is_global_zero:
            return
        rounded = {name: float(format_value(value)) for name, value in values.items()}
        for logger in trainer.loggers:  # the file is one of them
            try:
                logger.log_metrics(rounded, step)
            except OSError as error:
                raise SaveError(
                    f"{self.file.path} could not be written: {error}. Mend that and run the same "
                    f"command again"
                ) from error


def _batch_size(batch: Any) -> int:
    """Return the number of samples of a batch: a tensor, or a sequence or mapping of tensors."""
    if isinstance(batch, Mapping):
        batch = next(iter(batch.values()))
    elif isinstance(batch, list | tuple):
        batch = batch[0]
    return len(batch)
