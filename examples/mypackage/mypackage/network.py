"""A backbone."""

import torch
from torch import Tensor, nn
from typing_extensions import override

from mypackage.blocks import Block


class Plain(nn.Module):
    """Blocks of one width at full resolution.

    Args:
        num_classes: number of labels; 0 for none.
        width: channels, a multiple of 4.
        depth: number of blocks.
        dropout: inside the blocks.

    Raises:
        ValueError: ``width`` is not a multiple of 4.
    """

    def __init__(
        self, *, num_classes: int = 0, width: int = 32, depth: int = 4, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if width % 4:
            raise ValueError(f"width={width} must be a multiple of 4")
        self.num_classes = num_classes
        self.time = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(num_classes + 1, width)  # the last is the null label
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList([Block(width, dropout) for _ in range(depth)])
        self.last = nn.Conv2d(width, 3, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    @override
    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Return a prediction ``(b, 3, h, w)``.

        Args:
            x: noisy images ``(b, 3, h, w)``.
            t: times ``(b,)`` in [0, 1].
            label: ``(b,)`` int64; None is the null label.
        """
        if label is None:
            label = torch.full(t.shape, self.num_classes, dtype=torch.int64, device=t.device)
        return self.predict(x, self.time(t[:, None]) + self.label(label))

    def predict(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Return a prediction ``(b, 3, h, w)``.

        Args:
            x: noisy images ``(b, 3, h, w)``.
            embedding: of everything else that the network is told, ``(b, width)``.
        """
        h = self.first(x)
        for block in self.blocks:
            h = block(h, embedding)
        return self.last(h)


class Reader(Plain):
    """The same network, told a vector instead of a label.

    Args:
        dim: numbers in a vector.
        width: as in ``Plain``.
        depth: as in ``Plain``.
        dropout: as in ``Plain``.
    """

    def __init__(
        self, *, dim: int = 8, width: int = 32, depth: int = 4, dropout: float = 0.0
    ) -> None:
        super().__init__(width=width, depth=depth, dropout=dropout)
        self.vector = nn.Linear(dim, width)

    @override
    def forward(self, x: Tensor, t: Tensor, vector: Tensor) -> Tensor:  # type: ignore[override]
        """Return a prediction ``(b, 3, h, w)``; ``vector`` is ``(b, dim)``."""
        return self.predict(x, self.time(t[:, None]) + self.vector(vector))
