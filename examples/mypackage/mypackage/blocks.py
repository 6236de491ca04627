"""The blocks of the backbone."""

from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override


class Block(nn.Module):
    """Two convolutions beside a shortcut, scaled and shifted by a condition.

    At the start of training it is the identity.

    Args:
        width: channels, a multiple of 4.
        dropout: share of activations that are dropped between the convolutions.
    """

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, width)
        self.condition = nn.Linear(width, 2 * width)
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    @override
    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Return features ``(b, width, h, w)``, given ``x`` of that shape and ``(b, width)``."""
        scale, shift = self.condition(condition)[:, :, None, None].chunk(2, dim=1)
        h = self.norm(x) * (1 + scale) + shift
        return x + self.second(self.dropout(F.silu(self.first(h))))
