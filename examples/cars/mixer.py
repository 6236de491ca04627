"""What a patch cannot see: the whole picture, for pictures that are aligned with each other.

Attention compares patches with patches, and in strong noise finds nothing to compare. Where
pictures are aligned, a
matched filter does: the whole picture against one of its own.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sturdy.backbone.embed import zero_init

# numbers that a token is told; as many as it has channels would be most of the network's weights
RANK = 32


def spectrum(x: Tensor) -> Tensor:
    """The cosine transform over colours, rows and columns, ``(b, c, h, w)``, times 8 / (2 +
    frequency).

    What a picture shows is in few of these numbers, and noise in all: their weights are learned
        sooner than pixels'.
    The transform is the orthonormal DCT-II; a frequency is the length of (row's, column's), in half
    waves a picture.
    """
    colours, rows, columns = (cosines(n, like=x) for n in x.shape[1:])
    waves = torch.einsum("kc,bchw->bkhw", colours, rows @ x @ columns.T)
    row, column = (torch.arange(n, dtype=x.dtype, device=x.device) for n in x.shape[2:])
    return waves * 8 / (2 + torch.hypot(row[:, None], column))


def cosines(n: int, *, like: Tensor) -> Tensor:
    """The orthonormal DCT-II of n numbers, ``(n, n)``: wave k is cos(pi k (i + 1/2) / n)."""
    i = torch.arange(n, dtype=like.dtype, device=like.device)
    waves = torch.cos(i[:, None] * (i + 0.5) * (math.pi / n))
    return waves * torch.where(i == 0, 1 / n, 2 / n).sqrt()[:, None]


class GlobalMixer(nn.Module):
    """What each token is told of the whole picture, ``x (b, c, h, w), c (b, width) -> (b, tokens,
    width)``; at first 0.

        u = silu(m(compare(spectrum(x)))),    v = u + silu(m'(think(u))),    spread(tell(v))

        where m(z) = z (1 + scale(c)) + shift(c)

    Every unit of u has compared all pixels; ``c``, which knows the noise, tells how far to trust
    it.

    Args:
        pixels: numbers of a picture.
        tokens: of a picture.
        units: of u and of v.
    """

    def __init__(self, pixels: int, tokens: int, width: int, *, units: int) -> None:
        super().__init__()
        self.compare = nn.Linear(pixels, units)
        self.think = nn.Linear(units, units)
        self.modulation = zero_init(nn.Linear(width, 4 * units))
        self.tell = nn.Linear(units, tokens * RANK)
        self.spread = zero_init(nn.Linear(RANK, width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        scale1, shift1, scale2, shift2 = self.modulation(c).chunk(4, dim=1)
        u = F.silu(self.compare(spectrum(x).flatten(1)) * (1 + scale1) + shift1)
        v = u + F.silu(self.think(u) * (1 + scale2) + shift2)
        return self.spread(self.tell(v).unflatten(1, (-1, RANK)))
