"""Stop a run that gets no better.

All that it needs is in ``metrics.csv``, so a resumed run stops at the same step.
"""

import logging
import math
from collections.abc import Mapping

import lightning as L
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from exact_resume import distributed
from exact_resume.metrics import MetricsCSV

log = logging.getLogger(__name__)


class EarlyStopping(Callback):
    """Stops after ``patience`` validations in a row without a new best.

    Args:
        patience: None for never.
        monitor: a metric of the validation.
        mode: ``min`` if small values are good, ``max`` if large ones are.
    """

    def __init__(
        self, *, patience: int | None = None, monitor: str = "val/loss", mode: str = "min"
    ) -> None:
        if patience is not None and patience < 1:
            raise ValueError(f"patience={patience} must be at least 1, or null")
        if mode not in ("min", "max"):
            raise ValueError(f"mode={mode} must be min or max")
        self.patience = patience
        self.monitor = monitor
        self.sign = 1 if mode == "min" else -1

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop_if_due(trainer)

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop_if_due(trainer)

    def stale(self, scores: Mapping[int, float]) -> int:
        """Return the number of validations since the best of ``scores`` by step."""
        finite = {step: self.sign * score for step, score in scores.items() if math.isfinite(score)}
        best = min(finite, key=lambda step: (finite[step], step), default=-1)
        return sum(step > best for step in scores)

    def _stop_if_due(self, trainer: L.Trainer) -> None:
        if self.patience is None:
            return
        record = trainer.logger
        assert isinstance(record, MetricsCSV)
        stale = distributed.run_on_rank_zero(lambda: self.stale(record.column(self.monitor)))
        if stale < self.patience:
            return
        trainer.should_stop = True
        if distributed.rank() == 0:
            log.info(
                f"step {trainer.global_step}: {self.monitor} was no better {self.patience} times; "
                f"stopping"
            )
