"""Store the averages of the weights now and then, for later reconstruction.

``sturdy.training.ema_snapshots`` says what a snapshot contains.
"""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from exact_resume.callbacks import before_evaluation
from exact_resume.checkpoint.writer import SaveError
from sturdy.errors import ConfigError
from sturdy.training.ema import PowerEMA
from sturdy.training.ema_snapshots import path_of, snapshot, write

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class EMASnapshots(Callback):
    """Writes ``step-00000500.ckpt`` every N steps and at the last one, before training goes on.

    A step that a resumed run repeats is written again, with the same bits.

    Args:
        directory: ``runs/<name>/ema``.
        every_n_steps: None for never.
        dtype: of the stored parameters: ``float32``, ``bfloat16`` or ``float16``.

    Raises:
        ValueError: an argument is out of its range.
        ConfigError: by ``setup``, if the module's average is not a ``PowerEMA``.
    """

    def __init__(
        self, *, directory: str | Path, every_n_steps: int | None = None, dtype: str = "float32"
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps} must be at least 1, or null for never")
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype} must be one of {', '.join(DTYPES)}")
        self.directory = Path(directory)
        self.every_n_steps = every_n_steps
        self.dtype = DTYPES[dtype]

    @override
    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        if self.every_n_steps and not isinstance(pl_module.ema, PowerEMA):
            raise ConfigError(
                "callbacks.snapshots.every_n_steps is for ema=power; choose that, or set it to null"
            )

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            for unfinished in self.directory.glob(".step-*.ckpt"):
                unfinished.unlink()
        self._write_if_due(trainer, pl_module)  # a kill may have come before this step's snapshot

    @override
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        self._write_if_due(trainer, pl_module)

    def _write_if_due(self, trainer: L.Trainer, module: Any) -> None:
        step = trainer.global_step
        if not self.every_n_steps or not step:
            return
        if step % self.every_n_steps and step != trainer.max_steps:
            return
        before_evaluation(trainer)  # only finite numbers are stored
        # By all processes, since each may have a part of the weights only.
        taken = snapshot(module.ema, step, self.dtype)
        if not trainer.is_global_zero:
            return
        try:
            write(taken, self.directory)
        except (OSError, RuntimeError) as error:  # torch turns errors of the disk into its own
            raise SaveError(
                f"{path_of(self.directory, step)} could not be written: {error}. Mend that and run "
                f"the same command again"
            ) from error
