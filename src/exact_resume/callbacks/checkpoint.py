"""When a checkpoint is written and which are kept; how one is written is the store's."""

import logging
import math
import time
from collections.abc import Iterable

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from exact_resume import distributed
from exact_resume.checkpoint.store import CorruptCheckpointError, NoValidCheckpointError
from exact_resume.checkpoint.writer import StoreCheckpointIO
from exact_resume.metrics import MetricsCSV

log = logging.getLogger(__name__)


class Checkpoint(ModelCheckpoint):
    """Saves every N steps, every T minutes, when the monitored metric is among the best so far, and
    at the last step.

    A checkpoint may be saved before the validation of its step, so its score is written beside it
        later: by the
    checkpoint writer, before anything is deleted. What decides a deletion thus lies with the
    checkpoints, and ``metrics.csv`` may be lost. A checkpoint that was to be validated and has no
    score is not deleted as a worse one.

    Lightning's own triggers exclude each other and its deletions know nothing of a store, so only
    its name, place in the Trainer and configuration are used.

    Args:
        every_n_train_steps: None for never.
        every_n_minutes: None for never.
        monitor: a metric of the validation; ``mode`` says whether small (``min``) or large
            (``max``) is good.
        keep_last, keep_best: number of checkpoints kept, newest and best.
        keep_every: steps divisible by it are kept for good.
    """

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
    ) -> None:
        if mode not in ("min", "max"):
            raise ValueError(f"callbacks.checkpoint.mode={mode} must be min or max")
        if keep_last < 1 or keep_best < 0:
            raise ValueError(
                f"callbacks.checkpoint.keep_last={keep_last} must be at least 1, and "
                f"keep_best={keep_best} at least 0"
            )
        super().__init__(
            monitor=monitor, mode=mode, save_top_k=-1, filename="step-{step:08d}/state"
        )
        self.every, self.minutes = every_n_train_steps, every_n_minutes
        self.keep_last, self.keep_best, self.keep_every = keep_last, keep_best, keep_every
        self.saved_at, self.asked, self.reserved = time.monotonic(), -1, False
        self.scores: dict[
            int, float
        ] = {}  # the monitored metric by step; NaN is a score that is never best
        self.kept_scores: set[int] = set()  # steps whose checkpoint has its score beside it
        self.unscored: set[int] = set()  # steps whose score was lost

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        io = trainer.strategy.checkpoint_io
        assert isinstance(io, StoreCheckpointIO)
        assert isinstance(trainer.logger, MetricsCSV)
        self.io, self.store = io, io.store
        self.metrics: MetricsCSV = trainer.logger
        io.before_commit = (
            self.metrics.sync
        )  # the record reaches at least as far as the newest checkpoint
        io.after_commit = self._tidy
        self.dirpath = str(self.store.directory)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.saved_at = time.monotonic()
        self.scores, self.kept_scores, self.unscored = distributed.run_on_rank_zero(self._known)
        if trainer.global_step:
            self.save(
                trainer
            )  # entered from another place: from now on this run has something of its own to continue

    def on_train_batch_end(self, trainer: L.Trainer, *args: object) -> None:  # type: ignore[override]
        self.io.check()  # what went wrong in the background stops the run now
        if (
            not self.reserved
            and trainer.is_global_zero
            and trainer.strategy.lightning_restore_optimizer
        ):
            # Only now the optimizer has its state.
            self.io.preallocate(
                [
                    trainer.lightning_module.state_dict(),
                    *(o.state_dict() for o in trainer.optimizers),
                ]
            )
            self.reserved = True
        step = trainer.global_step
        late = self.minutes is not None and distributed.all_reduce_max(
            time.monotonic() - self.saved_at >= 60 * self.minutes
        )
        # The last step is saved at the end of training: a finished checkpoint has all its metrics
        # and pictures.
        if step < trainer.max_steps and ((self.every and step % self.every == 0) or late):
            self.save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        step, score = (
            trainer.global_step,
            float(trainer.callback_metrics.get(self.monitor or "", math.nan)),
        )
        self.scores[step] = score
        if step in self._best(self.scores) and step < trainer.max_steps:
            self.save(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """There is one endless epoch, and its end is nothing special."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.save(trainer)

    def save(self, trainer: L.Trainer) -> None:
        """Ask for a save of this step, unless it was saved already; what need not be kept is
        deleted after it.
        """
        step = trainer.global_step
        if step == self.asked or distributed.run_on_rank_zero(lambda: step in self.store.steps()):
            return
        trainer.save_checkpoint(self.store.state(step))
        self.asked, self.saved_at = step, time.monotonic()

    def state_dict(self) -> dict[str, object]:
        """None: what there is to know is in the store."""
        return {}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        pass

    def _known(self) -> tuple[dict[int, float], set[int], set[int]]:
        """Return all scores, the steps that have theirs in the store, and the steps whose score is
        lost.
        """
        monitor = self.monitor or ""
        kept = self.store.scores(monitor)
        scores = self.metrics.column(monitor) | kept
        unscored = {
            step for step in self.store.steps() if step not in scores and self._validated(step)
        }
        if unscored and self.keep_best:
            log.warning(
                "%s of step %s is neither in %s nor beside its checkpoint. It may be the best, so "
                "it is not deleted; "
                "delete it by hand if you do not need it",
                monitor,
                ", ".join(map(str, sorted(unscored))),
                self.metrics.path,
            )
        return scores, set(kept), unscored

    def _validated(self, step: int) -> bool:
        """Whether the run was to be validated at ``step``, by the config in its manifest."""
        try:
            config = self.store.manifest(step).get("fingerprint", {}).get("config", {})
        except (CorruptCheckpointError, NoValidCheckpointError, OSError):
            return False
        every, share = (
            config.get("trainer.val_check_interval"),
            config.get("trainer.limit_val_batches", 1.0),
        )
        return bool(every and share) and step % int(every) == 0

    def _tidy(self) -> None:
        """Write the scores of the checkpoints that lack theirs, then delete what need not be kept;
        by the writer.
        """
        for step in self.store.steps():
            if step in self.scores and step not in self.kept_scores:
                try:
                    self.store.write_score(step, self.monitor or "", self.scores[step])
                    self.kept_scores.add(step)
                except (
                    OSError
                ) as error:  # a full disk; it is in metrics.csv, and written at the next save
                    log.warning("the score of step %d could not be written: %s", step, error)
        self.store.prune(self._kept())

    def _kept(self) -> set[int]:
        steps = self.store.steps()
        every = [s for s in steps if self.keep_every and s % self.keep_every == 0]
        return {
            *steps[-self.keep_last :],
            *self._best(steps),
            *every,
            *(self.unscored if self.keep_best else ()),
        }

    def _best(self, steps: Iterable[int]) -> list[int]:
        """The ``keep_best`` of ``steps`` with the best scores."""
        sign = 1 if self.mode == "min" else -1
        scored = [s for s in steps if math.isfinite(self.scores.get(s, math.nan))]
        return sorted(scored, key=lambda s: sign * self.scores[s])[: self.keep_best]
