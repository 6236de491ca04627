"""Any map-style dataset as an endless stream of samples by position.

    sample at position p = dataset[permutation of epoch p // n, at p % n]

Everything random about a sample, such as its augmentation, is drawn after Python's, NumPy's and
PyTorch's generators were seeded from (seed, position). So neither the number of workers nor what
they had prefetched when the process died changes a sample.
"""

import random
from collections.abc import Iterator
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from exact_resume.permutation import FeistelPermutation, InfiniteBatchSampler
from exact_resume.randomness import key, reseed


class PositionDataset(Dataset[Any]):
    """``dataset`` by position instead of by index.

    Args:
        dataset: map-style, with a length.
        seed: of the order and of the samples' randomness.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed
        self.order = FeistelPermutation(len(dataset), seed)

    def __getitem__(self, position: int) -> Any:
        """Return the sample at ``position``, a function of (seed, position)."""
        position = int(position)
        index = int(self.order([position])[0])
        number = key(self.seed, "sample", position)
        random.seed(number)
        np.random.seed(number % 2**32)
        reseed(self.seed, "sample", position)
        return self.dataset[index]


class PartialBatchSampler(Sampler[list[int]]):
    """The part of each batch of ``sampler`` that belongs to one process."""

    def __init__(self, sampler: InfiniteBatchSampler) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[list[int]]:
        for positions in self.sampler:
            yield positions.tolist()


class PositionData(L.LightningDataModule):
    """Train on ``train`` without an end, in an order that is a function of (seed, position).

    Args:
        train: map-style dataset to train on.
        val: map-style dataset to validate on, in its own order; None for no validation.
        batch_size: samples of one batch over all processes together.
        seed: of the order and of the samples' randomness.
        num_workers: processes that read batches ahead.
        digest: identifies the data; other data are then another trajectory. By default the
            numbers of samples.
        loader_options: further options of the ``DataLoader``, such as ``collate_fn``.
    """

    def __init__(
        self,
        train: Any,
        val: Any = None,
        *,
        batch_size: int,
        seed: int = 0,
        num_workers: int = 0,
        digest: str | None = None,
        **loader_options: Any,
    ) -> None:
        super().__init__()
        self.train = train
        self.val = val
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.digest = digest or f"{len(train)} and {len(val) if val is not None else 0} samples"
        self.loader_options = loader_options

    @property
    def position(self) -> int:
        """The number of samples that the optimizer steps so far have used."""
        trainer = self.trainer
        assert trainer is not None
        return trainer.global_step * trainer.accumulate_grad_batches * self.batch_size

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the endless stream from the current position on."""
        trainer = self.trainer
        assert trainer is not None
        if self.batch_size % trainer.world_size:
            raise ValueError(
                f"batch_size={self.batch_size} cannot be cut into {trainer.world_size} equal "
                f"parts, one for each process"
            )
        size = self.batch_size // trainer.world_size
        part = slice(trainer.global_rank * size, (trainer.global_rank + 1) * size)
        sampler = InfiniteBatchSampler(self.position, self.batch_size, part=part)
        return self._loader(
            PositionDataset(self.train, self.seed), batch_sampler=PartialBatchSampler(sampler)
        )

    def val_dataloader(self) -> Any:
        """Return the validation samples in their own order; an empty list if there are none."""
        if self.val is None:
            return []
        return self._loader(self.val, batch_size=self.batch_size)

    def state_dict(self) -> dict[str, int]:
        """Return the position, which is saved with a checkpoint."""
        return {"position": self.position}

    def _loader(self, dataset: Any, **options: Any) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            # Workers' seeds come from here, and not from the default generator.
            generator=torch.Generator(),
            **options,
            **self.loader_options,
        )
