"""Notice numbers that are not finite, before they reach a record, an image or a checkpoint.

Steps are checked together, so that none waits for the step before it: when the record is written,
and before anything is validated, sampled or saved. The run then goes back to the last checkpoint
and leaves the batch of that step out.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from exact_resume.skips import NonFiniteLossError, SkippedBatch

CHECKED = ("loss", "grad_norm")  # among the outputs of a training step


@runtime_checkable
class NamesSamples(Protocol):
    """A data module that can name the samples at given positions."""

    def names(self, positions: NDArray[np.int64]) -> Sequence[str]:
        """Return the names of the samples, for people."""


class NanGuard(Callback):
    """Raises ``NonFiniteLossError`` for the first step whose loss or gradient is not finite.

    It must stand before all callbacks that use the weights. A training step returns its loss, or a
    mapping with ``loss`` and maybe ``grad_norm``.

    Args:
        max_skips: how many batches a run may leave out before it is given up.
    """

    def __init__(self, *, max_skips: int = 5) -> None:
        if max_skips < 0:
            raise ValueError(f"max_skips={max_skips} must be at least 0")
        self.max_skips = max_skips
        self.unchecked: list[tuple[int, Tensor, NDArray[np.int64]]] = []

    @override
    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self.unchecked.append((trainer.global_step, _checked(outputs), _positions(trainer, batch)))
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.check(trainer)

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.check(trainer)

    @override
    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: Any
    ) -> None:
        self.check(trainer)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.check(trainer)

    def before_evaluation(self, trainer: L.Trainer) -> None:
        """Check the steps so far before the weights are used."""
        self.check(trainer)

    def check(self, trainer: L.Trainer) -> None:
        """Check all steps since the last check, with one synchronisation.

        Raises:
            NonFiniteLossError: with the batch of the first step that is not finite.
        """
        if not self.unchecked:
            return
        values = torch.stack([numbers for _, numbers, _ in self.unchecked]).cpu()
        for (step, _, positions), numbers in zip(self.unchecked, values, strict=True):
            if not numbers.isfinite().all():
                raise NonFiniteLossError(_skip(trainer, step, numbers, positions))
        self.unchecked = []


def _checked(outputs: Any) -> Tensor:
    """Return the numbers to check, ``(n,)``."""
    if not isinstance(outputs, Mapping):
        return torch.as_tensor(outputs).detach().reshape(1)
    return torch.stack([outputs[name].detach() for name in CHECKED if name in outputs])


def _positions(trainer: L.Trainer, batch: Any) -> NDArray[np.int64]:
    """Return the global positions of a batch over all processes; empty if they are not known.

    A batch knows them in its attribute ``positions``, those of this process.
    """
    mine = getattr(batch, "positions", None)
    if mine is None:
        return np.empty(0, dtype=np.int64)
    return batch_positions(np.asarray(mine), trainer.global_rank, trainer.world_size)


def batch_positions(mine: NDArray[np.int64], rank: int, processes: int) -> NDArray[np.int64]:
    """Return the positions of a whole batch, of which process ``rank`` has the part ``mine``.

    The parts are consecutive, or their shards are dealt to the processes in turn, as by
    ``own_shards``.
    """
    gaps = np.flatnonzero(np.diff(mine) != 1)
    shard = int(gaps[0]) + 1 if len(gaps) else len(mine)
    return np.arange(len(mine) * processes) + int(mine[0]) - shard * rank


def _skip(
    trainer: L.Trainer, step: int, numbers: Tensor, positions: NDArray[np.int64]
) -> SkippedBatch:
    loss, *others = (f"{value:g}" for value in numbers.tolist())
    reason = f"train/loss was {loss}"
    for name, value in zip(CHECKED[1:], others, strict=False):
        reason += f" and train/{name} {value}"
    if not len(positions):
        return SkippedBatch(step, -1, 0, reason)
    data = trainer.datamodule  # type: ignore[attr-defined]
    images = tuple(data.names(positions)) if isinstance(data, NamesSamples) else ()
    return SkippedBatch(step, int(positions[0]), len(positions), reason, images)
