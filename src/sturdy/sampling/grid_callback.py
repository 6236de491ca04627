"""Grids of samples during training, always from the same noise."""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from PIL import Image
from typing_extensions import override

from exact_resume import distributed
from exact_resume.callbacks import before_evaluation
from exact_resume.failures import ToleratedErrors
from exact_resume.randomness import Draws, key
from sturdy.data.buckets import parse_size
from sturdy.diffusion.denoiser import Guided
from sturdy.diffusion.sampler import Sampler, sample
from sturdy.image_size import ImageSize, height_and_width
from sturdy.sampling.grids import class_columns, grid, save_png
from sturdy.training.captions import caption_option


class SampleGrids(Callback):
    """Writes ``step-00000500.png`` every N steps and at the last one, from the EMA weights.

    A grid that cannot be drawn or written is left out. Several processes draw it together. If one
    of them fails there, the attempt ends and all are started again.

    Args:
        directory: ``runs/<name>/samples``.
        sampler: draws the images.
        guidance: arguments of ``Guided``; without classes there is no guidance.
        image_size: height and width, in pixels; one number for squares.
        size: other height and width, a text such as ``48x80``; None for ``image_size``.
        every_n_steps: None for never.
        n: number of images. Classes take turns, so a column of the grid is a class. Captions do,
            too; of more than ``n``, it draws ``n`` that are spread evenly over all.
        seed: of the noise.
    """

    def __init__(
        self,
        *,
        directory: str | Path,
        sampler: Sampler,
        image_size: ImageSize,
        size: str | None = None,
        guidance: Mapping[str, Any] | None = None,
        every_n_steps: int | None = 500,
        n: int = 48,
        seed: int = 0,
    ) -> None:
        self.directory = Path(directory)
        self.sampler = sampler
        self.guidance = guidance
        self.size = parse_size("size", size) if size is not None else height_and_width(image_size)
        self.every_n_steps = every_n_steps
        self.n = n
        self.seed = seed
        self.tolerated = ToleratedErrors("the grid of samples")

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._draw_if_due(trainer, pl_module)  # the last attempt may have been killed before it

    @override
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        self._draw_if_due(trainer, pl_module)

    def _draw_if_due(self, trainer: L.Trainer, module: Any) -> None:
        step = trainer.global_step
        path = self.directory / f"step-{step:08d}.png"
        if not self._is_due(step, trainer.max_steps) or distributed.run_on_rank_zero(path.exists):
            return

        def save() -> None:
            with self.tolerated:
                save_png(image, path)
                for logger in trainer.loggers:
                    if hasattr(logger, "log_image"):
                        logger.log_image("samples", [str(path)], step=step)

        with self.tolerated if distributed.world_size() == 1 else nullcontext():
            image = self.draw(module)  # on all ranks: each may have only a part of the network
            distributed.run_on_rank_zero(save)

    def _is_due(self, step: int, last: int) -> bool:
        if not self.every_n_steps or not step:
            return False
        return step % self.every_n_steps == 0 or step == last

    def _labels(self, module: Any, rows: int) -> torch.Tensor:
        """Return the label of each image ``(n,)``: in turn, or spread over more captions than n."""
        numbers = torch.arange(self.n)
        if caption_option(module) and rows > self.n:
            return numbers * rows // self.n
        return numbers % rows

    def draw(self, module: Any) -> Image.Image:
        """Draw the grid with the EMA of ``module``, a ``DiffusionModule``."""
        average = module.ema.model
        denoiser = average
        classes = average.num_classes
        draws = Draws(key(self.seed, "samples"), range(self.n))
        noise = draws.normal("start", module.space.shape_of(*self.size)).to(module.device)
        labels = None
        if classes:
            numbers = self._labels(module, classes).to(module.device)
            labels = average.condition(noise, numbers).sized(*self.size)
            denoiser = Guided(denoiser, **(self.guidance or {"scale": 1.0}))
        # Between two calls of the network, a signal is honoured.
        hook = average.register_forward_pre_hook(lambda *_: before_evaluation(module.trainer))
        try:
            x0 = sample(self.sampler, denoiser, noise, labels, draws, clip=module.space.clip)
        finally:
            hook.remove()
        images = module.space.decode(x0)
        if module.space.cached:
            module.space.release()  # no step needs it
        return grid(images, columns=class_columns(self.n, classes))
