"""The LightningDataModule: one endless stream of batches by position, and the held-out images.

    batch of step k = the images at positions [k B, (k + 1) B)

Workers are given positions, not indices; what is random about an image (its crop, its flip) is drawn from its
position. So neither the number of workers nor what they had prefetched when the process died changes anything.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from sturdy.data.cache import Cache, Source, open_cache
from sturdy.data.order import Order
from sturdy.randomness import Draws


class Batch(NamedTuple):
    """Images ``(b, c, h, w)``, uint8 in the loader and float32 in [-1, 1] on the device; labels ``(b,)``."""

    image: Tensor
    label: Tensor
    positions: NDArray[np.int64]


class Images(Dataset[Batch]):
    """The images at given positions, cropped to ``size`` and flipped by the draws of each position."""

    def __init__(self, cache: Cache, order: Order, *, first: int, size: int, seed: int, flip: bool) -> None:
        self.cache, self.order, self.first, self.size, self.seed, self.flip = (
            cache,
            order,
            first,
            size,
            seed,
            flip,
        )
        self.split = Order(len(cache), 0, purpose="split")  # which images are held out depends on no seed

    def __getitem__(self, positions: NDArray[np.int64]) -> Batch:
        """The batch at ``positions``, ``(b,)``; without workers or loaders this is all there is to it."""
        indices = self.split(self.first + self.order(positions))
        draws = Draws(self.seed, positions.tolist())
        image = torch.from_numpy(self._pixels(indices, draws))
        if self.flip:
            flipped = draws.uniform("flip") < 0.5
            image[flipped] = image[flipped].flip(-1)
        return Batch(image, torch.from_numpy(self.cache.labels[indices]), positions)

    def _pixels(self, indices: NDArray[np.int64], draws: Draws) -> NDArray[np.uint8]:
        if self.cache.uniform and self.cache.image(0).shape[1:] == (self.size, self.size):
            return self.cache.gather(indices)
        corners = draws.uniform("crop", (2,)).numpy()
        out = np.empty((len(indices), 3, self.size, self.size), np.uint8)
        for row, index, corner in zip(out, indices, corners, strict=True):
            image = self.cache.image(int(index))
            y, x = (corner * (np.array(image.shape[1:]) - self.size + 1)).astype(int)
            row[:] = image[:, y : y + self.size, x : x + self.size]
        return out


class Endless(Sampler[NDArray[np.int64]]):
    """Positions of batch after batch from ``start`` on, without an end."""

    def __init__(self, start: int, batch_size: int) -> None:
        self.start, self.batch_size = start, batch_size

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        position = self.start
        while True:
            yield np.arange(position, position + self.batch_size)
            position += self.batch_size


class InSequence:
    """The identity order: held-out images always come in the same sequence."""

    def __call__(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        return positions


class ImageData(L.LightningDataModule):
    """Images of ``source``, decoded once into a cache, of which a fixed share is held out.

    Args:
        source: what can be decoded; its labels and classes.
        image_size: height and width of the pictures.
        batch_size: the *global* batch B.
        shards: V, the number of equal parts a batch is computed in; must divide it.
        num_workers: processes that read batches ahead; with the cache 0 is fastest.
        flip: mirror every second picture, by position.
        holdout: share of the images held out for validation.
        max_broken: largest share of broken images that is tolerated.
        cache: directory of decoded images.
        seed: the run's seed.
        root: where the source looks; here only so that ``data.root=DIR`` is short to type.
    """

    def __init__(
        self,
        source: Source,
        *,
        image_size: int,
        batch_size: int = 64,
        shards: int = 1,
        num_workers: int = 0,
        flip: bool = False,
        crop: str = "center",
        holdout: float = 0.1,
        max_broken: float = 0.01,
        cache: str | Path = ".cache",
        seed: int = 0,
        root: str | None = None,
    ) -> None:
        super().__init__()
        if shards < 1 or batch_size % shards:
            raise ValueError(f"data.batch_size={batch_size} cannot be cut into data.shards={shards} equal shards")
        if not 0 < holdout < 1:
            raise ValueError(f"data.holdout={holdout} is a share of the images; it must lie between 0 and 1")
        self.source, self.image_size, self.batch_size, self.num_workers = (
            source,
            image_size,
            batch_size,
            num_workers,
        )
        self.flip, self.holdout, self.max_broken, self.seed = flip, holdout, max_broken, seed
        self.cache_root = Path(cache)
        self.entry = (0, 0)  # (step, position) the run was entered at

    def open(self, **progress: Any) -> Cache:
        """Decode what is not yet decoded; afterwards ``classes``, ``digest`` and the loaders are there.

        Raises:
            ValueError: if there are too few images to hold any out.
        """
        self.cache = open_cache(self.source, root=self.cache_root, max_broken=self.max_broken, **progress)
        self.held_out = round(len(self.cache) * self.holdout)
        if not 0 < self.held_out < len(self.cache):
            raise ValueError(f"of {len(self.cache)} images data.holdout={self.holdout} holds out {self.held_out}")
        self.classes, self.digest = self.cache.classes, self.cache.digest
        return self.cache

    @property
    def position(self) -> int:
        """Samples handed out to the optimizer so far."""
        step, position = self.entry
        return position + (self.trainer.global_step - step) * self.batch_size  # type: ignore[union-attr]

    def train_dataloader(self) -> DataLoader[Batch]:
        order = Order(len(self.cache) - self.held_out, self.seed)
        images = self._images(order, self.held_out, flip=self.flip)
        return self._loader(images, Endless(self.position, self.batch_size))

    def val_dataloader(self) -> DataLoader[Batch]:
        size = self.batch_size
        batches = [np.arange(i, min(i + size, self.held_out)) for i in range(0, self.held_out, size)]
        return self._loader(self._images(InSequence(), 0, flip=False), batches)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """To float32 in [-1, 1], on the device, so that bytes travel."""
        return batch._replace(image=batch.image.float().div_(127.5).sub_(1))

    def state_dict(self) -> dict[str, int]:
        return {"step": self.trainer.global_step, "position": self.position}  # type: ignore[union-attr]

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.entry = (state["step"], state["position"])

    def _images(self, order: Any, first: int, *, flip: bool) -> Images:
        return Images(self.cache, order, first=first, size=self.image_size, seed=self.seed, flip=flip)

    def _loader(self, images: Images, batches: Any) -> DataLoader[Batch]:
        return DataLoader(
            images,
            sampler=batches,
            batch_size=None,  # the sampler yields whole batches of positions
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            generator=torch.Generator(),  # workers' seeds come from here, not from the default generator
        )
