"""Alignment of a backbone's insides with what a frozen encoder sees in the clean picture.

    loss = objective - weight mean over positions of cos(project(inner(x_t)), encoder(x_0))

REPA: Yu et al. 2024, "Representation Alignment for Generation", eq. 8. It is training's alone:
    samples need none of it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sturdy.encoders.encoder import Encoder, as_map


class Alignment(nn.Module):
    """A frozen encoder, and a trained projection of the features of one block into the encoder's.

    Args:
        backbone: whose ``inner(depth)`` tells the block and its channels.
        encoder: never trained.
        weight: lambda, of the mean cosine in the loss.
        depth: number of the block, from 1 on; None leaves it to the backbone.
        hidden: width of the projection, an MLP of three layers.

    Raises:
        ValueError: the backbone has no such block, or names none; ``weight`` is negative.
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
            raise ValueError(
                f"alignment.weight={weight} would push the features apart; it must be 0 or more"
            )
        self.weight, self.depth = weight, depth
        self.encoder = encoder.requires_grad_(False).eval()
        _, channels = self._block(backbone)
        self.project = nn.Sequential(
            nn.Linear(channels, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, encoder.channels),
        )

    @contextmanager
    def inside(self, backbone: nn.Module) -> Iterator[list[Tensor]]:
        """A list of what the block gives for each call of ``backbone`` meanwhile, in the graph of
        that call.

        What is recomputed in a later backward pass is none of these.
        """
        found: list[Tensor] = []
        block, _ = self._block(backbone)
        hook = block.register_forward_hook(lambda block, given, output: found.append(output))
        try:
            yield found
        finally:
            hook.remove()

    def forward(self, inner: Tensor, x0: Tensor) -> Tensor:
        """The mean cosine over positions, ``(b,)`` in [-1, 1].

        Args:
            inner: tokens ``(b, n, c)`` or a map ``(b, c, h', w')``; the encoder's map is resized to
                its grid.
            x0: the clean pictures ``(b, 3, h, w)`` in [-1, 1].

        Raises:
            ValueError: the encoder gives another number of channels than it says.
        """
        inner = as_map(inner, x0)  # (b, c, h', w')
        with torch.no_grad():
            seen = as_map(self.encoder(x0), x0).float()
            seen = F.interpolate(
                seen, inner.shape[2:], mode="bilinear", antialias=True
            )  # (b, d, h', w')
        if seen.shape[1] != self.encoder.channels:
            raise ValueError(
                f"the encoder gives {seen.shape[1]} channels, not {self.encoder.channels}: "
                f"set alignment.encoder.channels={seen.shape[1]}"
            )
        projected = self.project(inner.permute(0, 2, 3, 1))  # (b, h', w', d)
        return F.cosine_similarity(projected.float(), seen.permute(0, 2, 3, 1), dim=3).mean((1, 2))

    def _block(self, backbone: nn.Module) -> tuple[nn.Module, int]:
        if not hasattr(backbone, "inner"):
            raise ValueError(
                f"{type(backbone).__name__} does not name its blocks, so none can be aligned: give "
                f"it a method "
                f"inner(depth) -> (block, channels), or use alignment=none"
            )
        return backbone.inner(self.depth)  # type: ignore[operator]
