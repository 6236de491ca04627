"""When a checkpoint is written, and which checkpoints are kept; the store writes them."""

import logging
import math
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override

from exact_resume import distributed
from exact_resume.checkpoint.store import CorruptCheckpointError, NoValidCheckpointError
from exact_resume.checkpoint.writer import StoreCheckpointIO
from exact_resume.checkpoint_interval import SAVE_COST, SaveInterval
from exact_resume.metrics import MetricsCSV

log = logging.getLogger(__name__)


class Checkpoint(ModelCheckpoint):
    """Saves every N steps, every T minutes, at each new best score, and at the last step.

    A checkpoint may be saved before the validation of its step. So its score is written beside it
    later, and before anything is deleted: a deletion depends on the checkpoints alone, and
    ``metrics.csv`` may be lost. A checkpoint whose score is lost is not deleted as a worse one.

    Lightning's own triggers exclude each other, and its deletions know nothing of a store. Only its
    name, its place in the Trainer and its configuration are used.

    Args:
        every_n_train_steps: None for never.
        every_n_minutes: None for never.
        monitor: a metric of the validation.
        mode: ``min`` if small values are good, ``max`` if large ones are.
        keep_last: number of newest checkpoints to keep, at least 1.
        keep_best: number of best checkpoints to keep.
        keep_every: steps divisible by it are kept for good; None for none.
        every: ``auto`` saves as often as loses the least time, by the measured cost of a save. Then
            ``every_n_train_steps`` and ``every_n_minutes`` are not read, and the steps of
            ``keep_every`` are saved, too. None for the two of them.
        mean_time_between_failures: hours between two failures of the run, for ``every``. On several
            machines it is the hours of one machine divided by their number.
    """

    io: StoreCheckpointIO
    metrics: MetricsCSV

    def __init__(
        self,
        *,
        every_n_train_steps: int | None = 500,
        every_n_minutes: float | None = 10,
        monitor: str = "val/loss",
        mode: str = "min",
        keep_last: int = 3,
        keep_best: int = 1,
        keep_every: int | None = None,
        every: str | None = None,
        mean_time_between_failures: float = 24.0,
    ) -> None:
        if mode not in ("min", "max"):
            raise ValueError(f"mode={mode} must be min or max")
        if keep_last < 1:
            raise ValueError(f"keep_last={keep_last} must be at least 1")
        if keep_best < 0:
            raise ValueError(f"keep_best={keep_best} must be at least 0")
        if every not in (None, "auto"):
            raise ValueError(
                f"every={every} must be auto or None; a number goes into every_n_train_steps or "
                f"every_n_minutes"
            )
        super().__init__(
            monitor=monitor, mode=mode, save_top_k=-1, filename="step-{step:08d}/state"
        )
        self.every_n_steps = every_n_train_steps
        self.every_n_minutes = every_n_minutes
        self.keep_last = keep_last
        self.keep_best = keep_best
        self.keep_every = keep_every
        self.interval: SaveInterval | None = None
        if every == "auto":
            self.interval = SaveInterval(mean_time_between_failures)
            self.every_n_steps = keep_every
            self.every_n_minutes = None
        self.saved_at = time.monotonic()
        self.saved_step = -1
        self.is_preallocated = False
        self.scores: dict[int, float] = {}  # by step; NaN is a score that is never best
        self.stored_scores: set[int] = set()  # steps whose score lies beside their checkpoint
        self.lost_scores: set[int] = set()  # steps that were validated and have no score

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        io = trainer.strategy.checkpoint_io
        assert isinstance(io, StoreCheckpointIO)
        assert isinstance(trainer.logger, MetricsCSV)
        self.io = io
        self.store = io.store
        self.metrics = trainer.logger
        io.before_commit = self.metrics.sync  # the record is never older than a checkpoint
        io.after_commit = self._delete_unneeded
        self.dirpath = str(self.store.directory)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.saved_at = time.monotonic()
        found = distributed.run_on_rank_zero(self._read_scores)
        self.scores, self.stored_scores, self.lost_scores = found
        if self.interval and trainer.is_global_zero:
            self.interval.read(self.store.directory.parent / SAVE_COST)
        if trainer.global_step:
            # Resumed from another directory, the run now gets a checkpoint of its own.
            self.save(trainer)

    @override
    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.io.check()  # an error of the writer stops the run now
        self._preallocate(trainer)
        step = trainer.global_step
        is_due = bool(self.every_n_steps) and step % (self.every_n_steps or 1) == 0
        # All ranks must ask, even where the step decides.
        is_late = self._is_late()
        # The last step is saved at the end of training, with all its metrics.
        if step < trainer.max_steps and (is_due or is_late):
            self.save(trainer)

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        step = trainer.global_step
        score = float(trainer.callback_metrics.get(self.monitor or "", math.nan))
        # Those of the processes may differ, and all must save together.
        self.scores[step] = distributed.run_on_rank_zero(lambda: score)
        if step in self._best(self.scores) and step < trainer.max_steps:
            self.save(trainer)

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pass  # there is one endless epoch

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.save(trainer)

    def save(self, trainer: L.Trainer) -> None:
        """Save this step, unless it was saved already; unneeded checkpoints are deleted after."""
        step = trainer.global_step
        if step == self.saved_step:
            return
        if distributed.run_on_rank_zero(lambda: step in self.store.steps()):
            return
        with self._measure_save(trainer):
            trainer.save_checkpoint(self.store.state(step))
        self.saved_step = step
        self.saved_at = time.monotonic()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {}  # everything is in the store

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass

    def _is_late(self) -> bool:
        seconds = time.monotonic() - self.saved_at
        if self.interval:
            is_late = distributed.rank() == 0 and self.interval.is_due(seconds)
        elif self.every_n_minutes is None:
            return False
        else:
            is_late = seconds >= 60 * self.every_n_minutes
        return bool(distributed.all_reduce_max(is_late))

    def _measure_save(self, trainer: L.Trainer) -> AbstractContextManager[None]:
        if self.interval and trainer.is_global_zero:
            return self.interval.measure()
        return nullcontext()

    def _preallocate(self, trainer: L.Trainer) -> None:
        """Let the writer allocate its buffers, once the optimizer has its state."""
        if self.is_preallocated or not trainer.is_global_zero:
            return
        if not trainer.strategy.lightning_restore_optimizer:
            return
        states = [optimizer.state_dict() for optimizer in trainer.optimizers]
        self.io.preallocate([trainer.lightning_module.state_dict(), *states])
        self.is_preallocated = True

    def _read_scores(self) -> tuple[dict[int, float], set[int], set[int]]:
        """Return all scores, the steps that have theirs in the store, and the steps without one."""
        monitor = self.monitor or ""
        stored = self.store.scores(monitor)
        scores = self.metrics.column(monitor) | stored
        missing = [step for step in self.store.steps() if step not in scores]
        lost = {step for step in missing if self._was_validated(step)}
        if lost and self.keep_best:
            steps = ", ".join(map(str, sorted(lost)))
            log.warning(
                f"{monitor} of step {steps} is neither in {self.metrics.path} nor beside its "
                f"checkpoint. It may be the best, so it is not deleted; delete it by hand if you "
                f"do not need it"
            )
        return scores, set(stored), lost

    def _was_validated(self, step: int) -> bool:
        """Return whether the run was to be validated at ``step``, by the config in its manifest."""
        try:
            config = self.store.manifest(step).get("fingerprint", {}).get("config", {})
        except (CorruptCheckpointError, NoValidCheckpointError, OSError):
            return False
        every = config.get("trainer.val_check_interval")
        fraction = config.get("trainer.limit_val_batches", 1.0)
        return bool(every and fraction) and step % int(every) == 0

    def _delete_unneeded(self) -> None:
        """Write the scores that are not in the store yet, then delete what is not kept.

        It is called by the writer's thread.
        """
        if self.interval:
            self.interval.note_durable()
        for step in self.store.steps():
            if step in self.stored_scores or step not in self.scores:
                continue
            try:
                self.store.write_score(step, self.monitor or "", self.scores[step])
                self.stored_scores.add(step)
            except OSError as error:  # it is in metrics.csv, and is written at the next save
                log.warning("the score of step %d could not be written: %s", step, error)
        self.store.prune(self._kept_steps())

    def _kept_steps(self) -> set[int]:
        steps = self.store.steps()
        kept = {*steps[-self.keep_last :], *self._best(steps)}
        if self.keep_every:
            kept |= {step for step in steps if step % self.keep_every == 0}
        if self.keep_best:
            kept |= self.lost_scores
        return kept

    def _best(self, steps: Iterable[int]) -> list[int]:
        """Return the ``keep_best`` steps with the best scores."""
        sign = 1 if self.mode == "min" else -1
        scored = [step for step in steps if math.isfinite(self.scores.get(step, math.nan))]
        return sorted(scored, key=lambda step: sign * self.scores[step])[: self.keep_best]
