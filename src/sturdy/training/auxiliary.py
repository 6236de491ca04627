"""A second loss beside the objective's, for training alone."""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager

from torch import Tensor, nn


class AuxiliaryLoss(nn.Module, ABC):
    """A term that is added to the loss of the objective, such as ``Alignment``.

    It is built with the backbone and is a submodule of the ``DiffusionModule``, so that all its
    weights are saved. Sampling does not need it: a checkpoint is loaded for sampling without it.
    """

    @property
    @abstractmethod
    def head(self) -> nn.Module:
        """Return the part that is trained with the network; all else is frozen."""

    @abstractmethod
    def observe(self, backbone: nn.Module) -> AbstractContextManager[list[Tensor]]:
        """Return a context that records what the loss needs of each forward pass inside it."""

    @abstractmethod
    def forward(self, features: list[Tensor], image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the term ``(b,)``, and the scalars to log, detached, by name.

        Args:
            features: as recorded by ``observe``.
            image: the clean images as the data module yields them, ``(b, 3, h, w)`` in [-1, 1].
        """
