"""A callback."""

import json
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from typing_extensions import override


class WeightNorms(Callback):
    """Writes the norm of every parameter into ``step-00000500.json``, every N steps.

    A step that comes again after a kill writes the same file again.

    Args:
        directory: for the files.
        every_n_steps: N.
    """

    def __init__(self, *, directory: str, every_n_steps: int = 500) -> None:
        self.directory = Path(directory)
        self.every_n_steps = every_n_steps

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        """Write the file of this step, if it is due."""
        step = trainer.global_step
        if step % self.every_n_steps or not trainer.is_global_zero:
            return
        norms = {
            name: p.norm().item() for name, p in pl_module.named_parameters() if p.requires_grad
        }
        self.directory.mkdir(parents=True, exist_ok=True)
        file = self.directory / f"step-{step:08d}.json"
        file.write_text(json.dumps(norms, indent=1))
