"""A condition."""

from typing import Self

import torch
from torch import Tensor
from typing_extensions import override

from exact_resume.randomness import generator
from sturdy.diffusion.condition import Condition


class ClassVector(Condition):
    """A fixed vector ``(b, dim)`` for each class, as the embedding of a caption would be.

    Args:
        label: ``(b,)`` int64 in [0, num_classes]; num_classes is the null label.
        num_classes: number of classes.
        augmentation: must be None, as this condition does not tell it.
        dim: numbers in a vector.

    Raises:
        ValueError: the images are augmented.
    """

    def __init__(
        self,
        label: Tensor,
        num_classes: int,
        augmentation: Tensor | None = None,
        *,
        dim: int = 8,
    ) -> None:
        if augmentation is not None:
            raise ValueError("condition=class_vector does not tell the network of data.augment")
        rows = [torch.randn(dim, generator=generator("vector", k)) for k in range(num_classes)]
        table = torch.stack([*rows, torch.zeros(dim)]).to(label.device)
        super().__init__(table[label])
        self.null_vector = table[num_classes]

    @override
    def drop(self, mask: Tensor) -> Self:
        (vector,) = self.rows
        assert vector is not None
        mask = mask.to(vector.device)[:, None]
        return self.with_rows(torch.where(mask, self.null_vector, vector))

    @override
    def arguments(self) -> tuple[Tensor | None, ...]:
        return self.rows
