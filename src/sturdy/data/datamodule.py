"""The LightningDataModule: one endless stream of batches by position, and the held-out images.

    batch of step k = the images at positions [k B, (k + 1) B)

Workers are given positions, not indices; what is random about an image (its crop, its flip) is
drawn from its position. So neither the number of workers nor what they had prefetched when the
process died changes anything.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from exact_resume.permutation import FeistelPermutation, InfiniteBatchSampler
from sturdy.data.augment import Augment
from sturdy.data.cache import Cache, find_cache, open_cache
from sturdy.data.changes import describe_changes, describe_unused
from sturdy.data.decode import MAX_PIXELS, Crop
from sturdy.data.folder import Folder
from sturdy.data.images import Augmented, Batch, Images, in_sequence
from sturdy.data.options import check_choice, check_fraction, check_fraction_or_count, check_int
from sturdy.data.source import Source
from sturdy.data.split import BalancedPermutation, Split
from sturdy.progress import ProgressPrinter

SplitBy = Literal["count", "content"]


class ImageData(L.LightningDataModule):
    """Images of ``source``, decoded once into a cache, of which a fixed share is held out.

    Args:
        source: what can be decoded; its labels and classes. Or a function that lists it, which
            ``open`` calls.
        image_size: height and width of the pictures.
        batch_size: the *global* batch B.
        shards: V, the number of equal parts a batch is computed in; must divide it.
        num_workers: processes that read batches ahead; with the cache 0 is fastest.
        flip: mirror every second picture, by position.
        augment, translate, rotate: of ``Augment``; with probability 0 there is none.
        balance: from 0, classes as often as they are, to 1, all equally often in training.
        holdout: share of the images held out for validation.
        fold, folds: hold out part ``fold``, from 1 on, of ``folds`` equal ones instead; together
            they are all images.
        split: ``"content"`` decides by the content of each image alone whether it is held out, so
            that no image changes sides when others come or go; ``"count"`` holds out the exact
            share of how many there are.
        max_broken: most broken images to do without: their share, or their number, a whole one from
            1 on.
        cache: directory of decoded images.
        seed: the run's seed.

    Raises:
        ValueError: an option is out of its range; the message names its key.
    """

    def __init__(
        self,
        source: Source | Callable[[], Source],
        *,
        image_size: int,
        batch_size: int = 64,
        shards: int = 1,
        num_workers: int = 0,
        flip: bool = False,
        augment: float = 0.0,
        translate: float = 0.125,
        rotate: bool = False,
        balance: float = 0.0,
        holdout: float = 0.1,
        fold: int | None = None,
        folds: int | None = None,
        split: SplitBy = "count",  # what runs began with that were before there was a choice
        max_broken: float = 0.01,
        cache: str | Path = ".cache",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.given, self.cache_root, self.seed = source, Path(cache), seed
        self.image_size = check_int("data.image_size", image_size)
        self.batch_size = check_int("data.batch_size", batch_size)
        self.num_workers = check_int("data.num_workers", num_workers, least=0)
        self.flip = check_choice("data.flip", flip, (True, False))
        how = Augment(augment, translate=translate, rotate=rotate)
        self.augment = how if augment else None
        self.conditions = (
            how.size if augment else 0
        )  # that the network is told of each training image
        self.balance = check_fraction("data.balance", balance)
        self.holdout, self.fold, self.folds = check_fraction("data.holdout", holdout), fold, folds
        self.split_by = check_choice("data.split", split, get_args(SplitBy))
        self.max_broken = check_fraction_or_count("data.max_broken", max_broken)
        self.shards = check_int("data.shards", shards)
        if batch_size % shards:
            raise ValueError(
                f"data.batch_size={batch_size} cannot be cut into data.shards={shards} equal shards"
            )
        if (fold is None) != (folds is None):
            raise ValueError(
                f"data.fold={fold} data.folds={folds}: give both, as in data.fold=2 data.folds=5, "
                f"or none"
            )
        if fold is not None and check_int("data.fold", fold) > check_int(
            "data.folds", folds, least=2
        ):
            raise ValueError(
                f"data.fold={fold} is none of data.folds={folds}: they are numbered from 1 to "
                f"{folds}"
            )
        if holdout in (0, 1):
            raise ValueError(
                f"data.holdout={holdout} leaves no image to validate on, or none to train on"
            )
        self.entry = (0, 0)  # (step, position) the run was entered at
        self.skips: Sequence[
            tuple[int, int, int]
        ] = ()  # batches to leave out, as of ``InfiniteBatchSampler``
        self.rank, self.processes = 0, 1  # which consecutive part of every batch is computed here
        self.limit_val: int | float = 1.0  # of the held-out batches: how many, or what share

    def open(self, begun: str | None = None) -> Cache:
        """Decode what is not yet decoded, telling how far it is where that takes more than seconds.

        Afterwards ``classes``, their frequencies ``prior``, ``digest`` and the loaders are there,
        and ``cache.report()`` tells what was left out.

        Args:
            begun: the ``digest`` of the images that a run began with. If they are still in the
                cache, they are used, whatever the source has now; nothing is decoded, and ``notes``
                tells what the source has otherwise.
                The source need not be there: it is then ``None``. The options must be those that
                    the run began with.

        Raises:
            ValueError: if there are too few images to hold any out, too many broken ones, or too
                small ones.
            OSError: if they cannot be read, or the cache cannot be written.
        """
        self.notes: list[str] = []
        self.cache = self._begun_with(begun) if begun else self._cached(self._listed())
        n = len(self.cache)
        if n < 2:
            found = "".join(f"\n  {line}" for line in self.understood())
            raise ValueError(
                f"there is one image only: at least two are needed, one to train on and one held "
                f"out{found}"
            )
        if (smallest := self.cache.shapes.min()) < self.image_size:
            raise ValueError(
                f"the source gives images of {smallest} pixels, fewer than "
                f"data.image_size={self.image_size}"
            )
        self.split, self.digest = self._split()
        self.held_out = len(self.split.held_out)
        self.classes = self.cache.classes
        self.prior = (
            (np.bincount(self.cache.labels, minlength=len(self.classes)) / n).tolist()
            if self.classes
            else []
        )
        self.order = self._order(n - self.held_out)
        return self.cache

    def changes_since(self, begun: str) -> list[str]:
        """Say how the open images differ by name from those of the digest ``begun``, where these
        are cached.
        """
        old = find_cache(self.cache_root, begun)
        return describe_changes(old, self.cache) if old else []

    def _listed(self) -> Source:
        """The source, listed now."""
        self.source: Source | None = self.given() if callable(self.given) else self.given
        return self.source

    def _cached(self, source: Source) -> Cache:
        with ProgressPrinter("preparing images") as progress:
            return open_cache(
                source, root=self.cache_root, max_broken=self.max_broken, progress=progress
            )

    def _begun_with(self, digest: str) -> Cache:
        """The images of ``digest``, if they are in the cache; else those of the source."""
        away: Exception | None = None
        try:
            source = self._listed()
        except (OSError, ValueError) as error:
            self.source, away = None, error
        cache = find_cache(self.cache_root, digest, prefer=None if away else source.key)
        if cache is None or (self.split_by == "content" and cache.contents is None):
            if away:
                raise away
            self.notes = [
                f"the images that the run began with are not in paths.cache={self.cache_root}: all "
                f"are read"
            ]
            return self._cached(source)
        if away:
            self.notes = [
                f"{away}. The {len(cache):,} images that the run began with are still in "
                f"{cache.path}"
            ]
        else:
            self.notes = describe_unused(cache, source)
        return cache

    def _split(self) -> tuple[Split, str]:
        """What is held out, and the digest of all that this depends on."""
        n, contents = len(self.cache), self.cache.contents
        if self.split_by == "count":
            split = (
                Split.fold(n, self.fold or 1, self.folds)
                if self.folds
                else Split.share(n, self.holdout)
            )
            return split, self.cache.digest
        assert contents is not None
        assert self.cache.digest_with_contents is not None
        if self.folds:
            return Split.content_fold(
                contents, self.fold or 1, self.folds
            ), self.cache.digest_with_contents
        return Split.content_share(contents, self.holdout), self.cache.digest_with_contents

    def understood(self) -> list[str]:
        """What the source took for what, and what is odd about the images in the cache; a line
        each.
        """
        lines: list[str] = getattr(self.source, "understood", list)()
        return lines + self.cache.remarks

    def _order(self, n: int) -> Callable[[NDArray[np.int64]], NDArray[np.int64]]:
        """Of the ``n`` training images."""
        if not self.balance:
            return FeistelPermutation(n, self.seed)
        if not self.classes:
            raise ValueError(
                f"data.balance={self.balance} balances classes, and these images have none; set it "
                f"to 0"
            )
        labels = self.cache.labels[self.split(np.arange(self.held_out, len(self.cache)))]
        return BalancedPermutation(labels, self.seed, balance=self.balance)

    @property
    def position(self) -> int:
        """Positions behind the optimizer so far; handed out, or left out."""
        step, position = self.entry
        stream = InfiniteBatchSampler(position, self.batch_size, step, self.skips)
        return stream.first(self.trainer.global_step - 1) + self.batch_size  # type: ignore[union-attr]

    def train_dataloader(self) -> DataLoader[Batch | Augmented]:
        images = Images(
            self.cache,
            self.split,
            self.order,
            first=self.held_out,
            size=self.image_size,
            seed=self.seed,
            flip=self.flip,
            augment=self.augment,
        )
        step = self.trainer.global_step  # type: ignore[union-attr]
        size = self.batch_size // self.processes
        part = slice(self.rank * size, (self.rank + 1) * size)
        return self._loader(
            images, InfiniteBatchSampler(self.position, self.batch_size, step, self.skips, part)
        )

    def names(self, positions: NDArray[np.int64]) -> list[str]:
        """What to call the training images at ``positions`` in a report."""
        return [self.cache.name(int(i)) for i in self.split(self.held_out + self.order(positions))]

    def val_dataloader(self) -> DataLoader[Batch | Augmented]:
        """The held-out images, a shard a batch: shards take turns over the processes, the last one
        comes more often
        where they do not come out even, so that all processes have the same number of batches."""
        size = self.batch_size // self.shards
        limit = self.limit_val * (
            self.batch_size if isinstance(self.limit_val, int) else self.held_out
        )
        end = min(self.held_out, max(1, round(limit)))
        batches = [np.arange(i, min(i + size, end)) for i in range(0, end, size)]
        mine = [
            batches[min(i + self.rank, len(batches) - 1)]
            for i in range(0, len(batches), self.processes)
        ]
        return self._loader(
            Images(self.cache, self.split, in_sequence, first=0, size=self.image_size), mine
        )

    def on_after_batch_transfer(
        self, batch: Batch | Augmented, dataloader_idx: int
    ) -> Batch | Augmented:
        """To float32 in [-1, 1], on the device, so that bytes travel."""
        return batch._replace(image=batch.image.float().div_(127.5).sub_(1))

    def state_dict(self) -> dict[str, int]:
        return {"step": self.trainer.global_step, "position": self.position}  # type: ignore[union-attr]

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.entry = (state["step"], state["position"])

    def _loader(self, images: Images, batches: Any) -> DataLoader[Batch | Augmented]:
        return DataLoader(
            images,
            sampler=batches,
            batch_size=None,  # the sampler yields whole batches of positions
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            # workers' seeds come from here, not from the default generator
            generator=torch.Generator(),
        )


def folder_data(
    *,
    root: str | Sequence[str],
    image_size: int = 64,
    crop: Crop = "center",
    background: str | Sequence[int] = "white",
    labels: bool | Literal["auto"] = "auto",
    max_pixels: int = MAX_PIXELS,
    min_side: int | None = None,
    exclude: Sequence[str] = (),
    any_suffix: bool = False,
    **stream: Any,
) -> ImageData:
    """``ImageData`` of a ``Folder``, the options of both side by side: short to type, and each said
    once.
    """
    options: dict[str, Any] = {
        "crop": crop,
        "background": background,
        "labels": labels,
        "max_pixels": max_pixels,
        "min_side": min_side,
        "exclude": exclude,
        "any_suffix": any_suffix,
    }
    return ImageData(
        partial(Folder, root=root, size=image_size, **options), image_size=image_size, **stream
    )
