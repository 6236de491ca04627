"""The real images that a run is judged against: its training and its held-out images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from hydra.utils import instantiate
from numpy.typing import NDArray
from omegaconf import DictConfig
from torch import Tensor

from exact_resume.resume import ResumeRefusedError
from sturdy.encoders.images import ImageSet, unscaled
from sturdy.errors import add_key
from sturdy.evaluation.features import Features
from sturdy.progress import ProgressPrinter
from sturdy.sampling.loaded_run import LoadedRun

MIN_HELD_OUT = 2
MIN_TRAINING = 4


@dataclass(frozen=True)
class ReferenceImages:
    """The training and the held-out images of a run.

    Attributes:
        train: with features.
        held_out: with features.
        options: names of the options of each attribute that is known of the images.
        class_attribute: the attribute that is the class; None if none is.
        class_of: the class of each label, ``(conditions + 1,)``, where labels are rows of captions
            and each caption is of one class; -1 for a caption of none of these images. Else None.
        labels_are_captions: whether labels are rows of captions, and no classes.
        conditions: number of labels that a network can be asked for; 0 without labels.
        cache_key: primitives that identify the images.
        cache_folder: for results that are computed from the images.
    """

    train: ImageSet
    held_out: ImageSet
    options: Mapping[str, Sequence[str]]
    class_attribute: str | None
    class_of: Tensor | None
    conditions: int
    labels_are_captions: bool
    cache_key: tuple[object, ...]
    cache_folder: Path

    def with_classes(self, images: ImageSet) -> ImageSet:
        """Return ``images`` with classes as labels; without labels where no classes follow."""
        if not self.labels_are_captions or images.labels is None:
            return images
        labels = None if self.class_of is None else self.class_of[images.labels]
        if labels is not None and (labels < 0).any():
            labels = None
        return replace(images, labels=labels)


def open_data(cfg: DictConfig, run: LoadedRun) -> Any:
    """Return the data module of the run, open on the images that it was trained on.

    Raises:
        ValueError: if its code is not trusted, or the images cannot be opened.
        ResumeRefusedError: if the images are neither in the cache nor at the source.
    """
    data, settings = build_data(cfg, run)
    trained_on = run.point.manifest.get("fingerprint", {}).get("data")
    try:
        data.open(expected_digest=trained_on)
    except (ValueError, OSError) as error:
        message = add_key(str(error), "data", settings)
        raise ValueError(f"{message}. If the images were moved: data_root=FOLDER") from None
    for note in data.notes:
        print(add_key(note, "data", settings), flush=True)
    if trained_on not in (None, data.digest):
        raise ResumeRefusedError(
            f"the images are not those that {cfg.run} was trained on (digest {trained_on[:12]}, "
            f"now {data.digest[:12]}): nothing could be said about memorisation. Give the folder "
            f"of those as data_root=..."
        )
    return data


def build_data(cfg: DictConfig, run: LoadedRun) -> tuple[Any, dict[str, Any]]:
    """Return the data module of the run, not open yet, and its arguments.

    Raises:
        ValueError: if its code is not trusted.
    """
    settings = {**run.config["data"], "cache": cfg.paths.cache}
    if cfg.data_root is not None:
        source = settings.get("source")
        if isinstance(source, dict) and "root" in source:
            settings["source"] = {**source, "root": cfg.data_root}
        else:
            settings["root"] = cfg.data_root
    if settings.get("labels") == "auto" and run.config.get("classes") is not None:
        settings["labels"] = bool(run.config["classes"])  # as it was decided in training
    run.trust.check(run.point.state, run.config, ["data"])
    return instantiate({"data": settings})["data"], settings


def load_reference_images(data: Any, features: Features, most: int, cache: Path) -> ReferenceImages:
    """Load the images and their features.

    Args:
        data: the data module of the run, open.
        features: are prepared for the training images.
        most: training images at most.
        cache: the folder ``paths.cache``.

    Raises:
        ValueError: if there are too few images of either set.
    """
    reference = _without_features(data, most, cache / "evaluation")
    key = reference.cache_key
    folder = reference.cache_folder
    train = reference.train
    features.prepare(
        train.pixels,
        classes_at(data, np.arange(data.held_out, data.held_out + len(train))),
        len(data.classes),
        data=key,
        folder=folder,
        tell=ProgressPrinter("features"),
    )

    def with_features(images: ImageSet, which: str) -> ImageSet:
        found = features.extract_cached(
            images.pixels,
            data=(*key, which),
            folder=folder,
            tell=ProgressPrinter(f"features of {which} images"),
        )
        labels = images.labels if reference.conditions else None
        return replace(images, features=found, labels=labels)

    return replace(
        reference,
        train=with_features(train, "training"),
        held_out=with_features(reference.held_out, "held-out"),
    )


def _without_features(data: Any, most: int, folder: Path) -> ReferenceImages:
    total = len(data.cache)
    if data.held_out < MIN_HELD_OUT or total - data.held_out < MIN_TRAINING:
        raise ValueError(
            f"{data.held_out} of {total} images are held out; a report compares with at least "
            f"{MIN_HELD_OUT} that are, and {MIN_TRAINING} that are not: train with another "
            f"data.holdout, or with more images"
        )
    images = data.val_dataloader().dataset  # the held-out images come first, then the others
    held_out_positions = np.arange(data.held_out)
    train_positions = np.arange(data.held_out, min(data.held_out + most, total))
    sets = []
    for positions in (train_positions, held_out_positions):
        batch = images[positions]
        classes = classes_at(data, positions)
        answers = {"class": classes} if data.classes else {}
        pixels = unscaled(batch.image)
        sets.append(ImageSet(pixels, batch.label, torch.empty(len(positions), 0), answers))
    options: dict[str, Sequence[str]] = {"class": tuple(data.classes)} if data.classes else {}
    class_attribute = "class" if data.classes else None
    if _has_attributes(data):
        values = [
            [vars(data.source.attributes(i)) for i in images.split.indices(positions)]
            for positions in (train_positions, held_out_positions)
        ]
        options, class_attribute = _attribute_options(values, tuple(data.classes))
        sets = [
            replace(one, answers=_answers(of_set, options))
            for one, of_set in zip(sets, values, strict=True)
        ]
    train, held_out = sets
    first = images.split.indices(np.arange(8)).tolist()  # identifies the fold
    key = (data.digest, data.image_size, len(train), data.held_out, first)
    captions = len(getattr(data, "captions", []))
    class_of = None
    if captions and data.classes:
        positions = np.concatenate([train_positions, held_out_positions])
        rows = torch.cat([cast(Tensor, one.labels) for one in sets])
        class_of = classes_of_captions(rows, classes_at(data, positions), captions)
    return ReferenceImages(
        train=train,
        held_out=held_out,
        options=options,
        class_attribute=class_attribute,
        class_of=class_of,
        labels_are_captions=captions > 0,
        conditions=captions or len(data.classes),
        cache_key=key,
        cache_folder=folder,
    )


def classes_at(data: Any, positions: NDArray[np.int64]) -> Tensor:
    """Return the class of each image ``(n,)``, also where labels are rows of captions."""
    return torch.from_numpy(data.cache.labels[data.split.indices(positions)])


def classes_of_captions(rows: Tensor, classes: Tensor, captions: int) -> Tensor | None:
    """Return the class of each caption ``(captions + 1,)``, -1 for one without an image.

    None if images of one caption are of several classes.

    Args:
        rows: the row of each image's caption, ``(n,)``; ``captions`` is the empty one.
        classes: the class of each image, ``(n,)``.
        captions: how many there are.
    """
    found = torch.full((captions + 1,), -1)
    found[rows] = classes
    return found if torch.equal(found[rows], classes) else None


def _has_attributes(data: Any) -> bool:
    """Whether the source knows the attributes of exactly the images that are cached."""
    if data.source is None:  # it is gone; the images come from the cache alone
        return False
    same_images = data.source.key == data.cache.key and not data.cache.quarantine
    return same_images and hasattr(data.source, "attributes")


def _attribute_options(
    values: Sequence[Sequence[Mapping[str, Any]]], classes: tuple[str, ...]
) -> tuple[dict[str, Sequence[str]], str | None]:
    """Return the options of each attribute that is a text, and which attribute is the class."""
    names = [name for name, value in values[0][0].items() if isinstance(value, str)]
    options: dict[str, Sequence[str]] = {}
    for name in names:
        options[name] = sorted({one[name] for of_set in values for one in of_set})
    class_attribute = next((name for name in names if set(options[name]) <= set(classes)), None)
    if class_attribute:
        options[class_attribute] = classes
    return options, class_attribute


def _answers(
    values: Sequence[Mapping[str, Any]], options: Mapping[str, Sequence[str]]
) -> dict[str, Tensor]:
    """Return the index of each image's option, ``(n,)`` by attribute."""
    answers = {}
    for name, names in options.items():
        answers[name] = torch.tensor([names.index(one[name]) for one in values])
    return answers
