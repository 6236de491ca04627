"""The LightningDataModule: one endless stream of batches by position, and the held-out images.

    batch of step k = the images at positions [k B, (k + 1) B)

Workers are given positions, not indices, and the crop, the flip and the augmentation of an image
are drawn from its position. So the batches depend neither on the number of workers nor on the
batches that these had read ahead when the process was killed.
"""

from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, Literal, get_args

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from typing_extensions import override

from exact_resume.permutation import FeistelPermutation, InfiniteBatchSampler
from exact_resume.reduction import own_shards
from sturdy.data.augment import Augment
from sturdy.data.buckets import BucketOrder, Size, batches_of_one_size, describe_buckets
from sturdy.data.cache import Cache, find_cache, open_cache
from sturdy.data.changes import describe_unused
from sturdy.data.checks import (
    check_choice,
    check_fraction,
    check_fraction_or_count,
    check_image_size,
    check_int,
)
from sturdy.data.encoded import EncodedImages, ImageEncoder
from sturdy.data.folder import Folder
from sturdy.data.images import AugmentedBatch, Batch, ImageDataset, as_float
from sturdy.data.source import Source
from sturdy.data.split import BalancedPermutation, Order, Split, split_images
from sturdy.image_size import ImageSize, describe_size, height_and_width
from sturdy.progress import ProgressPrinter

SplitBy = Literal["count", "content"]


class ImageData(L.LightningDataModule):
    """The images of a source: decoded once into a cache, and some of them held out.

    Args:
        source: the images, or a function that returns them, which ``open`` calls.
        image_size: height and width of the images, in pixels; one number for squares.
        buckets: whether the images have several sizes, of which each batch has one. They are not
            cropped, and ``image_size`` is what the network is configured for.
        batch_size: B, of the *global* batch.
        shards: V, the number of equal parts in which a batch is computed; divides ``batch_size``.
        num_workers: processes that read batches ahead; 0 is fastest, because of the cache.
        flip: whether to mirror every second image, by position.
        augment: the ``probability`` of ``Augment``; 0 is no augmentation.
        translate: as of ``Augment``.
        rotate: as of ``Augment``.
        balance: of the classes in training: from 0, as frequent as they are, to 1, all equally
            frequent.
        holdout: the fraction of the images that is held out for validation.
        fold: instead of this fraction, hold out part ``fold``, counted from 1.
        folds: number of equal parts, which together are all images.
        split: ``"content"`` holds an image out because of its own content, so that no image changes
            sides when others are added or removed; ``"count"`` holds out the exact fraction. The
            default is the only split that older runs had.
        overfit: to look for mistakes, train on so many images only, again and again.
        max_broken: most broken images to accept: a fraction, ``float``, or a number, ``int``.
        cache: the folder of all caches of decoded images.
        seed: the seed of the run.

    Attributes:
        rank: number of the part of every batch that this process computes.
        processes: number of these parts.
        interleaved: whether the shards of a batch are dealt to the processes in turn.
        limit_val: of the held-out images: how many batches (``int``), or which fraction.
        skips: batches to leave out, as of ``InfiniteBatchSampler``.
        augmentation_size: length of the vector that describes an image's augmentation; 0 without.
        source: the source; ``None`` if it is no longer there. Set by ``open``, as all that follow.
        classes: the name of each class; empty when unlabelled.
        captions: the distinct captions, sorted, without the empty one; empty without captions. The
            label in a batch is then the row of the caption, and ``len(captions)`` if it is empty.
        moments: the cache of encoded images; ``None`` without. Set by ``encode_with``.
        prior: the frequency of each class among all images.
        held_out: number of the held-out images.
        digest: identifies the images, their labels and captions, and what the split depends on.
        notes: lines about how the images in use differ from those of the source.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        source: Source | Callable[[], Source],
        *,
        image_size: ImageSize,
        buckets: bool = False,
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
        split: SplitBy = "count",
        overfit: int | None = None,
        max_broken: float = 0.01,
        cache: str | Path = ".cache",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.source_or_function = source
        self.image_size = check_image_size("image_size", image_size)
        self.batch_size = check_int("batch_size", batch_size)
        self.shards = check_int("shards", shards)
        if batch_size % shards:
            raise ValueError(
                f"batch_size={batch_size} cannot be cut into shards={shards} equal shards"
            )
        self.num_workers = check_int("num_workers", num_workers, least=0)
        self.flip = check_choice("flip", flip, (True, False))
        augmentation = Augment(augment, translate=translate, rotate=rotate)
        if augment and rotate and not isinstance(self.image_size, int):
            raise ValueError(f"rotate={rotate} turns by quarters, which only squares can be")
        self.augment = augmentation if augment else None
        self.augmentation_size = augmentation.size if augment else 0
        self.balance = check_fraction("balance", balance)
        self.buckets = check_choice("buckets", buckets, (True, False))
        for name, value in (("augment", augment), ("balance", balance)):
            if buckets and value:
                raise ValueError(f"{name}={value} must be 0 with buckets")
        self.holdout = check_fraction("holdout", holdout)
        if holdout in (0, 1):
            raise ValueError(
                f"holdout={holdout} leaves no image to validate on, or none to train on"
            )
        self.fold, self.folds = _check_fold(fold, folds)
        self.split_by = check_choice("split", split, get_args(SplitBy))
        self.overfit = check_int("overfit", overfit) if overfit is not None else None
        self.max_broken = check_fraction_or_count("max_broken", max_broken)
        self.cache_root = Path(cache)
        self.seed = seed

        self.start_step = 0  # of this process, and the position there
        self.start_position = 0
        self.skips: Sequence[tuple[int, int, int]] = ()
        self.rank = 0
        self.processes = 1
        self.interleaved = False
        self.limit_val: int | float = 1.0
        self.source: Source | None = None
        self.moments: Cache | None = None
        self.notes: list[str] = []
        self.bucket_lines: list[str] = []

    def open(self, expected_digest: str | None = None) -> Cache:
        """Decode the images that are not in the cache yet, and report progress if it takes long.

        Args:
            expected_digest: the ``digest`` of the images that a run began with. If they are still
                in the cache, they are used, whatever the source has now, and even if the source is
                gone. Then ``notes`` says how the source differs. The arguments of this class must
                be those of that run.

        Returns:
            The cache; its ``report()`` says which images were left out.

        Raises:
            ValueError: there are too few images to hold any out, too many broken ones, or too small
                ones.
            OSError: the images cannot be read, or the cache cannot be written.
        """
        self.notes = []
        if expected_digest:
            self.cache = self._open_expected(expected_digest)
        else:
            self.cache = self._open_source(self._list_source())
        n = len(self.cache)
        if n < 2:
            found = "".join(f"\n  {line}" for line in self.summary_lines())
            raise ValueError(
                f"there is one image only: at least two are needed, one to train on and one held "
                f"out{found}"
            )
        too_small = (self.cache.shapes < height_and_width(self.image_size)).any(axis=1)
        if too_small.any() and not self.buckets:
            i = int(too_small.argmax())
            raise ValueError(
                f"image_size={self.image_size} is more than the "
                f"{describe_size(self.cache.shapes[i].tolist())} pixels of {self.cache.names[i]}"
            )
        self.split, self.digest = self._split()
        self.held_out = len(self.split.held_out)
        self.classes = self.cache.classes
        self.captions = self.cache.captions
        self.prior: list[float] = []
        if self.classes:
            counts = np.bincount(self.cache.labels, minlength=len(self.classes))
            self.prior = (counts / n).tolist()
        self.order = self._order(n - self.held_out)
        if isinstance(self.order, BucketOrder):
            self.bucket_lines = describe_buckets(self.order, self._held_out_sizes())
        return self.cache

    def encode_with(self, encoder: ImageEncoder, device: str | torch.device = "cpu") -> bool:
        """Encode the images once into a cache; batches then hold moments in place of pixels.

        The encoder runs in this process. Call it after ``open``.

        Args:
            encoder: has ``shape``, ``moments`` and ``key``.
            device: where it runs.

        Returns:
            Whether the cache was made now; otherwise it was there.

        Raises:
            ValueError: the images are augmented or cropped anew at every position.
            OSError: the cache cannot be written.
        """
        self.check_encodable()
        source = EncodedImages(
            self.cache, encoder, size=self.image_size, mirrored=self.flip, device=device
        )
        with ProgressPrinter("encoding images") as progress:
            self.moments = open_cache(
                source, root=self.cache_root, max_broken=0, workers=0, progress=progress
            )
        return source.encoded > 0

    def check_encodable(self) -> None:
        """Raise ValueError if an image of a position is not one of a few that can be encoded."""
        remedy = "encoded once, and the latent of a moved image is no moved latent"
        if self.augment:
            raise ValueError(
                f"augment={self.augment.probability} must be 0 where images are {remedy}"
            )
        is_other = self.cache.shapes != height_and_width(self.image_size)
        if is_other.any() and not self.buckets:
            raise ValueError(
                f"crop=random must be center where images are {remedy}: some images are larger "
                f"than image_size={self.image_size}"
            )

    def summary_lines(self) -> list[str]:
        """Say which images the source found, and what is unusual about them, a line each."""
        lines: list[str] = getattr(self.source, "summary_lines", list)()
        return lines + self.bucket_lines + self.cache.unusual

    def sizes(self) -> list[Size]:
        """Return the heights and widths that batches have."""
        if not self.buckets:
            return [height_and_width(self.image_size)]
        return [(height, width) for height, width in np.unique(self.cache.shapes, axis=0).tolist()]

    def names(self, positions: NDArray[np.int64]) -> list[str]:
        """Return the names of the training images at ``positions``."""
        indices = self.split.indices(self.held_out + self.order(positions))
        return [self.cache.names[int(i)] for i in indices]

    @property
    def position(self) -> int:
        """The number of positions up to the current step, trained on or left out."""
        batches = InfiniteBatchSampler(
            self.start_position, self.batch_size, self.start_step, self.skips
        )
        return batches.first(self._global_step() - 1) + self.batch_size

    @override
    def train_dataloader(self) -> DataLoader[Batch | AugmentedBatch]:
        images = ImageDataset(
            self.cache,
            self.split,
            self.order,
            first=self.held_out,
            size=self._crop_size,
            seed=self.seed,
            flip=self.flip,
            augment=self.augment,
            moments=self.moments,
        )
        own = own_shards(self.shards, self.rank, self.processes, interleaved=self.interleaved)
        part = np.arange(self.batch_size).reshape(self.shards, -1)[own].reshape(-1)
        batches = InfiniteBatchSampler(
            self.position, self.batch_size, self._global_step(), self.skips, part
        )
        return self._loader(images, batches)

    @override
    def val_dataloader(self) -> DataLoader[Batch | AugmentedBatch]:
        """Return the held-out images in batches of the size of a shard.

        The batches are dealt to the processes in turn. The last batch is repeated where needed, so
        that all processes have the same number of batches.
        """
        size = self.batch_size // self.shards
        unit = self.batch_size if isinstance(self.limit_val, int) else self.held_out
        end = min(self.held_out, max(1, round(self.limit_val * unit)))
        if self.buckets:
            batches = batches_of_one_size(self._held_out_sizes(), size, end=end)
        else:
            batches = [np.arange(i, min(i + size, end)) for i in range(0, end, size)]
        last = len(batches) - 1
        turns = range(0, len(batches), self.processes)
        of_this_process = [batches[min(i + self.rank, last)] for i in turns]
        images = ImageDataset(self.cache, self.split, size=self._crop_size, moments=self.moments)
        return self._loader(images, of_this_process)

    @override
    def on_after_batch_transfer(
        self, batch: Batch | AugmentedBatch, dataloader_idx: int
    ) -> Batch | AugmentedBatch:
        """Convert to float32, uint8 to [-1, 1]; on the device, so that bytes are transferred."""
        return batch._replace(image=as_float(batch.image))

    @override
    def state_dict(self) -> dict[str, int]:
        return {"step": self._global_step(), "position": self.position}

    @override
    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start_step = state["step"]
        self.start_position = state["position"]

    def _global_step(self) -> int:
        assert self.trainer is not None
        return self.trainer.global_step

    def _list_source(self) -> Source:
        given = self.source_or_function
        source = given() if callable(given) else given
        self.source = source
        return source

    def _open_source(self, source: Source) -> Cache:
        with ProgressPrinter("preparing images") as progress:
            return open_cache(
                source, root=self.cache_root, max_broken=self.max_broken, progress=progress
            )

    def _open_expected(self, digest: str) -> Cache:
        """Return the images of ``digest`` if they are in the cache, else those of the source."""
        error: Exception | None = None
        try:
            source = self._list_source()
        except (OSError, ValueError) as caught:
            self.source = None
            error = caught
        cache = find_cache(self.cache_root, digest, prefer=None if error else source.key)
        if cache and self.split_by == "content" and cache.contents is None:
            cache = None  # it is of an older version
        if cache is None:
            if error:
                raise error
            self.notes = [
                f"the images that the run began with are not in cache={self.cache_root}: all are "
                f"read"
            ]
            return self._open_source(source)
        if error:
            self.notes = [
                f"{error}. The {len(cache):,} images that the run began with are still in "
                f"{cache.path}"
            ]
        else:
            self.notes = describe_unused(cache, source)
        return cache

    def _split(self) -> tuple[Split, str]:
        """Return the split, and the digest of all that it depends on."""
        split = split_images(
            len(self.cache),
            self.cache.contents,
            split=self.split_by,
            holdout=self.holdout,
            fold=self.fold,
            folds=self.folds,
        )
        if self.split_by == "count":
            return split, self.cache.digest
        assert self.cache.digest_with_contents is not None
        return split, self.cache.digest_with_contents

    def _order(self, n: int) -> Order:
        """Return the order of the ``n`` training images."""
        n = min(n, self.overfit or n)
        places = np.arange(self.held_out, self.held_out + n)
        if self.buckets:
            sizes = self.cache.shapes[self.split.indices(places)]
            return BucketOrder(sizes, self.seed, batch_size=self.batch_size)
        if not self.balance:
            return FeistelPermutation(n, self.seed)
        if not self.classes:
            raise ValueError(
                f"balance={self.balance} balances classes, and these images have none; set it to 0"
            )
        labels = self.cache.labels[self.split.indices(places)]
        return BalancedPermutation(labels, self.seed, balance=self.balance)

    @property
    def _crop_size(self) -> ImageSize | None:
        """Height and width of the crops; None where images are taken whole."""
        return None if self.buckets else self.image_size

    def _held_out_sizes(self) -> NDArray[np.int64]:
        """Return height and width of each held-out image, ``(m, 2)``."""
        return self.cache.shapes[self.split.indices(np.arange(self.held_out))]

    def _loader(self, images: ImageDataset, batches: Any) -> DataLoader[Batch | AugmentedBatch]:
        return DataLoader(
            images,
            sampler=batches,
            batch_size=None,  # the sampler yields the positions of a batch
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            # Seeds of the workers come from here, not from the default generator.
            generator=torch.Generator(),
        )


def _check_fold(fold: int | None, folds: int | None) -> tuple[int | None, int | None]:
    if fold is None and folds is None:
        return None, None
    if fold is None or folds is None:
        raise ValueError(f"fold={fold} folds={folds}: give both, as in fold=2 folds=5, or none")
    if check_int("fold", fold) > check_int("folds", folds, least=2):
        raise ValueError(
            f"fold={fold} is none of folds={folds}: they are numbered from 1 to {folds}"
        )
    return fold, folds


def folder_data(
    *,
    root: str | Sequence[str],
    image_size: int = 64,
    buckets: Sequence[str] | str | None = None,
    **others: Any,
) -> ImageData:
    """Return ``ImageData`` of a ``Folder``, with the arguments of both side by side.

    Args:
        root: the folder of the images, or several.
        image_size: height and width of the images, in pixels.
        buckets: several heights and widths in place of ``image_size``, as of ``Folder``.
        **others: further arguments of ``Folder`` and of ``ImageData``.
    """
    names = signature(Folder).parameters
    of_folder = {name: value for name, value in others.items() if name in names}
    of_data = {name: value for name, value in others.items() if name not in names}
    list_folder = partial(Folder, root=root, image_size=image_size, buckets=buckets, **of_folder)
    return ImageData(list_folder, image_size=image_size, buckets=buckets is not None, **of_data)
