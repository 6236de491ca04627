"""Numbers that go bad: the run goes back to the last good checkpoint, and leaves the batch of that
step out.

Steps are looked at together, so that none waits for the one before it: when the record is written,
    and before anything
is validated, sampled or saved. So nothing that is not finite ever gets into the record, a picture
or a checkpoint.
"""

from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback

from exact_resume.skips import NonFiniteLossError, SkippedBatch


class NanGuard(Callback):
    """Raises ``NonFiniteLossError`` at the first step whose loss or gradient is not finite; to
    stand before all callbacks.

    Args:
        max_skips: batches that a run may leave out in all, before it is given up.
    """

    def __init__(self, *, max_skips: int = 5) -> None:
        if max_skips < 0:
            raise ValueError(f"callbacks.guard.max_skips={max_skips} must be at least 0")
        self.max_skips = max_skips
        self.unchecked: list[tuple[int, Any, Any]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        # Only validation and sampling evaluate the average.
        pl_module.ema.model.backbone.register_forward_pre_hook(lambda *_: self.check(trainer))

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        b = len(batch[2])  # of each process
        positions = np.arange(b * trainer.world_size) + int(batch[2][0]) - b * trainer.global_rank
        self.unchecked.append((trainer.global_step, outputs, positions))
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.check(trainer)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: Any
    ) -> None:
        self.check(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.check(trainer)

    def check(self, trainer: L.Trainer) -> None:
        """Look at all steps since the last look, with one synchronisation.

        Raises:
            NonFiniteLossError: with the batch of the first step that is not finite.
        """
        if not self.unchecked:
            return
        values = torch.stack(
            [torch.stack([o["loss"], o["grad_norm"]]) for _, o, _ in self.unchecked]
        ).cpu()
        for (step, _, positions), finite, (loss, norm) in zip(
            self.unchecked, values.isfinite().all(1), values.tolist(), strict=True
        ):
            if not finite:
                reason = f"train/loss was {loss:g} and train/grad_norm {norm:g}"
                images = tuple(trainer.datamodule.names(positions))  # type: ignore[attr-defined]
                raise NonFiniteLossError(
                    SkippedBatch(step, int(positions[0]), len(positions), reason, images)
                )
        self.unchecked = []
