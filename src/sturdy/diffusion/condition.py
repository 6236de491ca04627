"""The condition: everything that a network is told of a sample beside x_t and t.

    prediction = backbone(x_t, t, *condition.arguments())

With some samples dropped in training (classifier-free guidance, Ho & Salimans 2022), one network
learns both the conditional estimate and that of the null condition.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import copy
from typing import Self

import torch
from torch import Tensor
from typing_extensions import override


class Condition(ABC):
    """What is told of each of ``b`` samples. Conditions are not changed in place.

    A subclass defines ``drop`` and ``arguments``. A text condition, for example, keeps the
    embeddings of the captions' tokens ``(b, n, d)``, and ``drop`` puts those of the empty caption
    in their place. The option of ``condition=`` makes it from labels (``Denoiser.make_condition``).

    Args:
        rows: tensors with a row for each sample, the first of which is not None.
    """

    def __init__(self, *rows: Tensor | None) -> None:
        self.rows = rows

    @abstractmethod
    def drop(self, mask: Tensor) -> Self:
        """Return the condition with the null condition where ``mask`` is True.

        Args:
            mask: ``(b,)`` bool on the CPU; move it to the device of the rows.
        """

    @abstractmethod
    def arguments(self) -> tuple[Tensor | None, ...]:
        """Return the arguments of the backbone that follow x_t and t."""

    def sized(self, height: int, width: int) -> Self:
        """Return the condition of images of this size in pixels, for networks that are told it."""
        return self

    def null(self) -> Self:
        """Return the null condition for as many samples."""
        return self.drop(torch.ones(len(self), dtype=torch.bool))

    def cat(self, other: Self) -> Self:
        """Return the condition of these samples, followed by those of ``other``."""
        pairs = zip(self.rows, other.rows, strict=True)
        joined = [None if a is None or b is None else torch.cat([a, b]) for a, b in pairs]
        return self.with_rows(*joined)

    def to(self, device: torch.device | str) -> Self:
        """Return the condition on ``device``."""
        return self._map(lambda row: row.to(device))

    def __getitem__(self, part: slice) -> Self:
        return self._map(lambda row: row[part])

    def __len__(self) -> int:
        return 0 if self.rows[0] is None else len(self.rows[0])

    def with_rows(self, *rows: Tensor | None) -> Self:
        """Return a copy with other ``rows``."""
        changed = copy(self)
        changed.rows = rows
        return changed

    def _map(self, change: Callable[[Tensor], Tensor]) -> Self:
        return self.with_rows(*[None if row is None else change(row) for row in self.rows])


class ClassCondition(Condition):
    """The class of an image and, in training, how the image was augmented.

    The backbone gets ``(label,)`` or ``(label, augmentation)``. The label ``num_classes`` is the
    null label. It does not replace the augmentation.

    Args:
        label: ``(b,)`` int64 in [0, num_classes].
        num_classes: 0 ignores the labels; the backbone then gets None.
        augmentation: ``(b, k)``, or None, which the backbone does not get.

    Raises:
        ValueError: a label is out of range (checked on the CPU only).
    """

    def __init__(self, label: Tensor, num_classes: int, augmentation: Tensor | None = None) -> None:
        super().__init__(label, augmentation)
        self.num_classes = num_classes
        # Not on a GPU: reading the answer would stall every call. There the embedding asserts.
        if num_classes == 0 or not label.is_cpu:
            return
        wrong = label[(label < 0) | (label > num_classes)]
        if wrong.numel():
            raise ValueError(
                f"label {wrong[0].item()} is out of range: with num_classes={num_classes} classes "
                f"are 0 to {num_classes - 1}, then comes the null label; set num_classes to that "
                f"of the data"
            )

    @override
    def drop(self, mask: Tensor) -> Self:
        label, augmentation = self.rows
        assert label is not None
        label = label.masked_fill(mask.to(label.device), self.num_classes)
        return self.with_rows(label, augmentation)

    @override
    def arguments(self) -> tuple[Tensor | None, ...]:
        label, augmentation = self.rows
        label = label if self.num_classes else None
        return (label,) if augmentation is None else (label, augmentation)
