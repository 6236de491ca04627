"""Which images changed sides between training and validation when the images of a run changed.

An image is known by its content. A split by content moves none, as long as ``holdout`` stays and
some image is below it; a split by count moves many.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from sturdy.data.cache import Cache, find_cache
from sturdy.data.changes import Change, comparable_hashes, find_changes
from sturdy.data.datamodule import ImageData
from sturdy.data.split import Split, split_images

SPLIT_KEYS = ("split", "holdout", "fold", "folds")  # arguments that decide who is held out

Sides = tuple[Cache, Split]
"""Images, and which of them are held out."""


def changes_since(
    data: ImageData, digest: str, settings: Mapping[str, Any] | None = None
) -> list[Change]:
    """Return how the images of ``data`` differ from those that a run had, and who changed sides.

    Args:
        data: open.
        digest: of the images of the run then, as of ``ImageData.open``.
        settings: arguments of ``ImageData`` then; those that decide which images were held out
            count. Without them, nothing is said about sides.
    """
    old = find_cache(data.cache_root, digest)
    if old is None:
        return [
            Change(
                f"the images that the run had are not in cache={data.cache_root} any more, so the "
                f"changes cannot be named"
            )
        ]
    is_same = old.digest == data.cache.digest
    changes = [] if is_same and settings is not None else find_changes(old, data.cache)
    if settings is None:
        return changes
    now = (data.split_by, data.holdout, data.fold, data.folds)
    then: Any = dict(zip(SPLIT_KEYS, now, strict=True))
    then |= {key: value for key, value in settings.items() if key in SPLIT_KEYS}
    split = split_images(len(old), old.contents, **then)
    moves = find_moves((old, split), (data.cache, data.split))
    if len(moves) > 1 and data.split_by == "count":
        moves.append(Change("with split=content, no image changes sides because others come or go"))
    return changes + moves


def find_moves(old: Sides, new: Sides) -> list[Change]:
    """Return how many held-out images stayed, and which images are on the other side now.

    An image counts as moved if any copy of it was on the other side before.
    """
    old_hashes, new_hashes = comparable_hashes(old[0], new[0])
    was_held_out, was_trained_on = _contents_of_sides(old_hashes, old[1])
    names = new[0].names
    held_out, training = _indices_of_sides(new[1])
    into_held_out = [names[i] for i in held_out if new_hashes[i] in was_trained_on]
    into_training = [names[i] for i in training if new_hashes[i] in was_held_out]
    stayed = sum(new_hashes[i] in was_held_out for i in held_out)
    moves = [Change(f"held out are {len(held_out):,} images, {stayed:,} of them as before")]
    if into_held_out:
        text = "held out now, but trained on before, so that val/loss looks too good"
        moves.append(Change(f"{len(into_held_out):,} of them are {text}", into_held_out))
    if into_training:
        text = "trained on now, but held out before"
        moves.append(Change(f"{len(into_training):,} images are {text}", into_training))
    return moves


def _indices_of_sides(split: Split) -> tuple[list[int], list[int]]:
    """Return the indices of the held-out images, and those of the training images."""
    indices = split.indices(np.arange(split.n)).tolist()
    first = len(split.held_out)
    return indices[:first], indices[first:]


def _contents_of_sides(hashes: list[int], split: Split) -> tuple[set[int], set[int]]:
    held_out, training = _indices_of_sides(split)
    return {hashes[i] for i in held_out}, {hashes[i] for i in training}
