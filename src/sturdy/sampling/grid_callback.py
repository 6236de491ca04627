"""Grids of samples during training, always from the same noise, so that one sees the pictures
come.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from exact_resume import distributed
from exact_resume.failures import ToleratedErrors
from exact_resume.randomness import Draws, key
from sturdy.diffusion.denoiser import Guided
from sturdy.diffusion.sampler import Sampler, sample
from sturdy.sampling.grids import class_columns, grid, save_png


class SampleGrids(Callback):
    """Writes ``step-00000500.png`` every N steps and at the last one, from the EMA weights.

    A grid that cannot be drawn or written is left out. Several processes draw it together, and if
    one of them fails there, all are started again.

    Args:
        directory: ``runs/<name>/samples``.
        sampler, guidance: how the pictures are drawn; without classes there is no guidance.
        image_size: height and width.
        every_n_steps: None for never.
        n: number of pictures; classes take turns, so a column of the grid is a class.
    """

    def __init__(
        self,
        *,
        directory: str | Path,
        sampler: Sampler,
        image_size: int,
        guidance: Mapping[str, Any] | None = None,
        every_n_steps: int | None = 500,
        n: int = 48,
        seed: int = 0,
    ) -> None:
        self.directory, self.sampler, self.guidance = Path(directory), sampler, guidance
        self.image_size, self.every, self.n, self.seed = image_size, every_n_steps, n, seed
        self.spared = ToleratedErrors("the grid of samples")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._draw_if_due(trainer, pl_module)  # the grid of this step, if a kill came before it

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        self._draw_if_due(trainer, pl_module)

    def _draw_if_due(self, trainer: L.Trainer, module: Any) -> None:
        step = trainer.global_step
        path = self.directory / f"step-{step:08d}.png"
        if not self.every or not step or (step % self.every and step != trainer.max_steps):
            return
        if distributed.run_on_rank_zero(path.exists):
            return

        def keep() -> None:
            with self.spared:
                save_png(image, path)
                for logger in trainer.loggers:
                    if hasattr(logger, "log_image"):
                        logger.log_image("samples", [str(path)], step=step)

        with self.spared if distributed.world_size() == 1 else nullcontext():
            image = self.draw(
                module
            )  # by all processes, since each may have a part of the network only
            distributed.run_on_rank_zero(keep)

    def draw(self, module: Any) -> Any:
        """The grid, with a class a column where there are classes."""
        denoiser = module.ema.model
        draws = Draws(key(self.seed, "samples"), range(self.n))
        noise = draws.normal("start", (3, self.image_size, self.image_size)).to(module.device)
        classes = denoiser.num_classes
        guided = Guided(denoiser, **(self.guidance or {"scale": 1.0})) if classes else denoiser
        label = torch.arange(self.n, device=module.device) % classes if classes else None
        pictures = sample(self.sampler, guided, noise, label, draws)
        return grid(pictures, columns=class_columns(self.n, classes))
