"""The LightningDataModule: one endless stream of batches by position, and the held-out images.

    batch of step k = the images at positions [k B, (k + 1) B)

Workers are given positions, not indices; what is random about an image (its crop, its flip) is drawn from its
position. So neither the number of workers nor what they had prefetched when the process died changes anything.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sturdy.data.cache import Cache, open_cache
from sturdy.data.decode import MAX_PIXELS, Crop
from sturdy.data.folder import Folder
from sturdy.data.options import one_of, share, whole
from sturdy.data.order import Endless, Order
from sturdy.data.progress import Progress
from sturdy.data.source import Source
from sturdy.randomness import Draws


class Batch(NamedTuple):
    """Images ``(b, c, h, w)``, uint8 in the loader and float32 in [-1, 1] on the device; labels ``(b,)``."""

    image: Tensor
    label: Tensor
    positions: NDArray[np.int64]


class Images(Dataset[Batch]):
    """The images at given positions, ``size`` by ``size``.

    With a ``seed`` they are cropped, and mirrored if ``flip``, by the draws of each position; without one nothing
    is random about them and crops are central.
    """

    def __init__(
        self,
        cache: Cache,
        order: Callable[[NDArray[np.int64]], NDArray[np.int64]],
        *,
        first: int,
        size: int,
        seed: int | None = None,
        flip: bool = False,
    ) -> None:
        self.cache, self.order, self.first, self.size, self.seed, self.flip = cache, order, first, size, seed, flip
        self.split = Order(len(cache), 0, purpose="split")  # which images are held out depends on no seed

    def __getitem__(self, positions: NDArray[np.int64]) -> Batch:
        """The batch at ``positions``, ``(b,)``; without workers or loaders this is all there is to it."""
        indices = self.split(self.first + self.order(positions))
        labels = torch.from_numpy(self.cache.labels[indices])
        if self.seed is None:
            return Batch(torch.from_numpy(self._pixels(indices, None)), labels, positions)
        draws = Draws(self.seed, positions.tolist())
        image = torch.from_numpy(self._pixels(indices, draws))
        if self.flip:
            flipped = draws.uniform("flip") < 0.5
            image[flipped] = image[flipped].flip(-1)
        return Batch(image, labels, positions)

    def _pixels(self, indices: NDArray[np.int64], draws: Draws | None) -> NDArray[np.uint8]:
        if self.cache.uniform and self.cache.image(0).shape[1:] == (self.size, self.size):
            return self.cache.gather(indices)
        centre = np.nextafter(np.full((len(indices), 2), 0.5), 0)  # just below: of two middles the first
        corners = centre if draws is None else draws.uniform("crop", (2,)).numpy()
        out = np.empty((len(indices), 3, self.size, self.size), np.uint8)
        for row, index, corner in zip(out, indices, corners, strict=True):
            image = self.cache.image(int(index))
            y, x = (corner * (np.array(image.shape[1:]) - self.size + 1)).astype(int)
            row[:] = image[:, y : y + self.size, x : x + self.size]
        return out


def in_sequence(positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """The order of the held-out images: always the same."""
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

    Raises:
        ValueError: an option is out of its range; the message names its key.
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
        holdout: float = 0.1,
        max_broken: float = 0.01,
        cache: str | Path = ".cache",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.source, self.cache_root, self.seed = source, Path(cache), seed
        self.image_size = whole("data.image_size", image_size)
        self.batch_size = whole("data.batch_size", batch_size)
        self.num_workers = whole("data.num_workers", num_workers, least=0)
        self.flip = one_of("data.flip", flip, (True, False))
        self.holdout = share("data.holdout", holdout)
        self.max_broken = share("data.max_broken", max_broken)
        self.shards = whole("data.shards", shards)
        if batch_size % shards:
            raise ValueError(f"data.batch_size={batch_size} cannot be cut into data.shards={shards} equal shards")
        if holdout in (0, 1):
            raise ValueError(f"data.holdout={holdout} leaves no image to validate on, or none to train on")
        self.entry = (0, 0)  # (step, position) the run was entered at
        self.skips: Sequence[tuple[int, int, int]] = ()  # batches to leave out, as of ``Endless``
        self.rank, self.processes = 0, 1  # which consecutive part of every batch is computed here
        self.limit_val: int | float = 1.0  # of the held-out batches: how many, or what share

    def open(self) -> Cache:
        """Decode what is not yet decoded, telling how far it is where that takes more than seconds.

        Afterwards ``classes``, ``digest`` and the loaders are there, and ``cache.report()`` tells what was left out.

        Raises:
            ValueError: if there are too few images to hold any out, too many broken ones, or too small ones.
            OSError: if they cannot be read, or the cache cannot be written.
        """
        with Progress("preparing images") as progress:
            self.cache = open_cache(self.source, root=self.cache_root, max_broken=self.max_broken, progress=progress)
        n = len(self.cache)
        if n < 2:
            raise ValueError("there is one image only: at least two are needed, one to train on and one held out")
        if (smallest := self.cache.shapes.min()) < self.image_size:
            raise ValueError(
                f"the source gives images of {smallest} pixels, fewer than data.image_size={self.image_size}"
            )
        self.held_out = min(max(1, round(n * self.holdout)), n - 1)
        self.classes, self.digest = self.cache.classes, self.cache.digest
        return self.cache

    @property
    def position(self) -> int:
        """Positions behind the optimizer so far; handed out, or left out."""
        step, position = self.entry
        stream = Endless(position, self.batch_size, step, self.skips)
        return stream.first(self.trainer.global_step - 1) + self.batch_size  # type: ignore[union-attr]

    def train_dataloader(self) -> DataLoader[Batch]:
        order = Order(len(self.cache) - self.held_out, self.seed)
        images = Images(self.cache, order, first=self.held_out, size=self.image_size, seed=self.seed, flip=self.flip)
        step = self.trainer.global_step  # type: ignore[union-attr]
        size = self.batch_size // self.processes
        part = slice(self.rank * size, (self.rank + 1) * size)
        return self._loader(images, Endless(self.position, self.batch_size, step, self.skips, part))

    def names(self, positions: NDArray[np.int64]) -> list[str]:
        """What to call the training images at ``positions`` in a report."""
        order, split = Order(len(self.cache) - self.held_out, self.seed), Order(len(self.cache), 0, purpose="split")
        return [self.cache.name(int(i)) for i in split(self.held_out + order(positions))]

    def val_dataloader(self) -> DataLoader[Batch]:
        """The held-out images, a shard a batch: shards take turns over the processes, the last one comes more often
        where they do not come out even, so that all processes have the same number of batches."""
        size = self.batch_size // self.shards
        limit = self.limit_val * (self.batch_size if isinstance(self.limit_val, int) else self.held_out)
        end = min(self.held_out, max(1, round(limit)))
        batches = [np.arange(i, min(i + size, end)) for i in range(0, end, size)]
        mine = [batches[min(i + self.rank, len(batches) - 1)] for i in range(0, len(batches), self.processes)]
        return self._loader(Images(self.cache, in_sequence, first=0, size=self.image_size), mine)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """To float32 in [-1, 1], on the device, so that bytes travel."""
        return batch._replace(image=batch.image.float().div_(127.5).sub_(1))

    def state_dict(self) -> dict[str, int]:
        return {"step": self.trainer.global_step, "position": self.position}  # type: ignore[union-attr]

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.entry = (state["step"], state["position"])

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


def folder_data(
    *,
    root: str,
    image_size: int = 64,
    crop: Crop = "center",
    background: str | Sequence[int] = "white",
    labels: bool | Literal["auto"] = "auto",
    max_pixels: int = MAX_PIXELS,
    **stream: Any,
) -> ImageData:
    """``ImageData`` of a ``Folder``, the options of both side by side: short to type, and each said once."""
    options: dict[str, Any] = {"crop": crop, "background": background, "labels": labels, "max_pixels": max_pixels}
    return ImageData(Folder(root=root, size=image_size, **options), image_size=image_size, **stream)
