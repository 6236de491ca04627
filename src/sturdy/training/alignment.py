"""Align the features of a backbone with those that a frozen encoder sees in the clean image.

    loss = objective - weight mean over positions of cos(project(features(x_t)), encoder(x_0))

REPA: Yu et al. 2024, "Representation Alignment for Generation", eq. 8.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from sturdy.encoders.encoder import Encoder, as_map
from sturdy.training.auxiliary import AuxiliaryLoss


class Alignment(AuxiliaryLoss):
    """A frozen encoder, and a trained projection of one block's features into the encoder's space.

    Args:
        backbone: its ``inner(depth)`` returns the block and its channels.
        encoder: never trained.
        weight: lambda, of the mean cosine in the loss.
        depth: number of the block, from 1 on; None leaves it to the backbone.
        hidden: width of the projection, an MLP of three layers.

    Raises:
        ValueError: the backbone has no such block, or no ``inner``; ``weight`` is negative.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        encoder: Encoder,
        weight: float = 0.5,
        depth: int | None = None,
        hidden: int = 256,
    ) -> None:
        super().__init__()
        if weight < 0:
            raise ValueError(f"weight={weight} would push the features apart; it must be 0 or more")
        self.weight = weight
        self.depth = depth
        self.encoder = encoder.requires_grad_(False).eval()
        _, channels = self._block(backbone)
        self.project = nn.Sequential(
            nn.Linear(channels, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, encoder.channels),
        )

    @property
    @override
    def head(self) -> nn.Module:
        return self.project

    @override
    @contextmanager
    def observe(self, backbone: nn.Module) -> Iterator[list[Tensor]]:
        """Record the output of the block, with its graph, for each call of ``backbone`` inside.

        A recomputation of the block in a later backward pass is not recorded.
        """
        features: list[Tensor] = []
        block, _ = self._block(backbone)
        hook = block.register_forward_hook(lambda block, args, output: features.append(output))
        try:
            yield features
        finally:
            hook.remove()

    @override
    def forward(self, features: list[Tensor], image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        (of_block,) = features
        cosine = self.cosine(of_block, image)
        return -self.weight * cosine, {"alignment": cosine.detach().mean()}

    def cosine(self, features: Tensor, image: Tensor) -> Tensor:
        """Return the mean cosine over positions, ``(b,)`` in [-1, 1].

        Args:
            features: tokens ``(b, n, c)`` or a map ``(b, c, h', w')``. The encoder's map is resized
                to their grid.
            image: the clean images ``(b, 3, h, w)`` in [-1, 1].

        Raises:
            ValueError: the encoder gives another number of channels than ``encoder.channels``.
        """
        features = as_map(features, image)  # (b, c, h', w')
        with torch.no_grad():
            seen = as_map(self.encoder(image), image).float()
            seen = F.interpolate(seen, features.shape[2:], mode="bilinear", antialias=True)
        if seen.shape[1] != self.encoder.channels:
            raise ValueError(
                f"the encoder gives {seen.shape[1]} channels, not {self.encoder.channels}: "
                f"set encoder.channels={seen.shape[1]}"
            )
        projected = self.project(features.permute(0, 2, 3, 1))  # (b, h', w', d)
        return F.cosine_similarity(projected.float(), seen.permute(0, 2, 3, 1), dim=3).mean((1, 2))

    def _block(self, backbone: nn.Module) -> tuple[nn.Module, int]:
        if not hasattr(backbone, "inner"):
            raise ValueError(
                f"{type(backbone).__name__} does not name its blocks, so none can be aligned: give "
                f"it a method inner(depth) -> (block, channels), or use alignment=none"
            )
        return backbone.inner(self.depth)  # type: ignore[operator]
