"""Any map-style dataset as an endless stream of samples by position.

    sample at position p = dataset[permutation of epoch p // n, at p % n]

Everything random about a sample, such as its augmentation, is drawn after Python's, NumPy's and
PyTorch's generators were seeded from (seed, position). So neither the number of workers nor what
they had prefetched when the process died changes a sample.
"""

import hashlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from exact_resume.permutation import FeistelPermutation, InfiniteBatchSampler
from exact_resume.randomness import key, reseed

DIGEST_SAMPLES = 64


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
        digest: identifies the data; other data are then another trajectory. By default it is of
            the number of samples and of ``DIGEST_SAMPLES`` of them.
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
        self.digest = digest or f"{digest_samples(train)} {digest_samples(val)}"
        self.loader_options = loader_options
        self.start_step = 0  # where this training began
        self.start_position = 0

    @property
    def position(self) -> int:
        """The number of samples that the optimizer steps so far have used."""
        trainer = self.trainer
        assert trainer is not None
        steps = trainer.global_step - self.start_step
        return self.start_position + steps * trainer.accumulate_grad_batches * self.batch_size

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
        """Return the step and the position, which are saved with a checkpoint."""
        assert self.trainer is not None
        return {"step": self.trainer.global_step, "position": self.position}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue at the position of a checkpoint."""
        self.start_step = state_dict["step"]
        self.start_position = state_dict["position"]

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


def digest_samples(dataset: Any) -> str:
    """Hash the length of a dataset and some of its samples, spread evenly; "" for None.

    Tensors and arrays count by their bytes, anything else by its ``repr``.
    """
    if dataset is None:
        return ""
    total = hashlib.sha256(str(len(dataset)).encode())
    samples = PositionDataset(dataset, seed=0)
    for i in range(min(DIGEST_SAMPLES, len(dataset))):
        _update(total, samples[i * len(dataset) // DIGEST_SAMPLES])
    return total.hexdigest()[:16]


def _update(total: Any, value: Any) -> None:
    if isinstance(value, Mapping):
        value = sorted(value.items())
    if isinstance(value, list | tuple):
        for item in value:
            _update(total, item)
    elif isinstance(value, Tensor | np.ndarray):
        array = np.ascontiguousarray(value)
        total.update(f"{array.dtype} {array.shape}".encode() + array.tobytes())
    else:
        total.update(repr(value).encode())
