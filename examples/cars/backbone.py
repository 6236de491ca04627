"""A diffusion transformer for aligned images, as an example of a backbone of one's own.

Attention compares patches with patches, and in strong noise finds nothing to compare. Where all
images show their object at the same place, a matched filter finds more: the image as a whole
against learned images. ``GlobalMixer`` is such a filter; ``AlignedDiT`` adds it to a DiT.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sturdy.backbone.dit import DiT
from sturdy.backbone.embed import zero_init
from sturdy.image_size import ImageSize, height_and_width

# Numbers that each token gets. As many as a token has channels would be most of the weights.
RANK = 32


class AlignedDiT(DiT):
    """A DiT whose tokens also get features of the whole image; for images of one size.

    Args:
        image_size: height and width of the images, multiples of ``patch``; one number for squares.
        global_units: hidden units of the ``GlobalMixer``.

    The other arguments are as of ``DiT``.

    Raises:
        ValueError: ``patch`` does not divide ``image_size``, or as of ``DiT``.
    """

    def __init__(
        self,
        *,
        image_size: ImageSize,
        global_units: int = 256,
        image_channels: int = 3,
        num_classes: int = 0,
        conditions: int = 0,
        patch: int = 2,
        width: int = 256,
        depth: int = 6,
        heads: int = 4,
        dropout: float = 0.0,
        checkpoint: bool = False,
    ) -> None:
        height, width_in_pixels = height_and_width(image_size)
        if height % patch or width_in_pixels % patch:
            raise ValueError(f"image_size={image_size} must be a multiple of patch={patch}")
        image_shape = (image_channels, height, width_in_pixels)
        tokens = (height // patch) * (width_in_pixels // patch)

        def mixer(width: int) -> GlobalMixer:
            return GlobalMixer(image_shape, tokens, width, units=global_units)

        super().__init__(
            image_channels=image_channels,
            num_classes=num_classes,
            conditions=conditions,
            patch=patch,
            width=width,
            depth=depth,
            heads=heads,
            dropout=dropout,
            checkpoint=checkpoint,
            token_features=mixer,
        )


class GlobalMixer(nn.Module):
    """An MLP on the spectrum of the image, ``x (b, c, h, w), c (b, width) -> (b, tokens, width)``.

        u = silu(m(in_proj(spectrum(x)))),    v = u + silu(m'(hidden(u))),    expand(out_proj(v))

        where m(z) = z (1 + scale(c)) + shift(c)

    Each unit of u compares all pixels with a learned image. The condition ``c`` contains the noise
    level, and thus how far a unit can be trusted. The result is 0 at the start of training.

    Args:
        image_shape: ``(c, h, w)``.
        tokens: number of tokens of an image.
        width: channels of a token, and length of the condition.
        units: length of u and of v.
    """

    def __init__(
        self, image_shape: tuple[int, int, int], tokens: int, width: int, *, units: int
    ) -> None:
        super().__init__()
        self.image_shape = image_shape
        self.in_proj = nn.Linear(math.prod(image_shape), units)
        self.hidden = nn.Linear(units, units)
        self.modulation = zero_init(nn.Linear(width, 4 * units))
        self.out_proj = nn.Linear(units, tokens * RANK)
        self.expand = zero_init(nn.Linear(RANK, width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Return the features of each token; raise ValueError if ``x`` has another shape."""
        if x.shape[1:] != self.image_shape:
            raise ValueError(
                f"images of shape {tuple(x.shape[1:])} do not fit a network for {self.image_shape}"
            )
        scale1, shift1, scale2, shift2 = self.modulation(c).chunk(4, dim=1)
        u = F.silu(self.in_proj(spectrum(x).flatten(1)) * (1 + scale1) + shift1)
        v = u + F.silu(self.hidden(u) * (1 + scale2) + shift2)
        return self.expand(self.out_proj(v).unflatten(1, (-1, RANK)))


def spectrum(x: Tensor) -> Tensor:
    """Return the cosine transform of ``x`` ``(b, c, h, w)``, times 8 / (2 + frequency).

    It is the orthonormal DCT-II over colours, rows and columns. A frequency is the length of
    (row's, column's), in half waves an image. Images have most of their energy in few of these
    numbers, and noise has the same in all of them, so that weights on them are learned sooner than
    weights on pixels.
    """
    colours, rows, columns = (cosines(n, like=x) for n in x.shape[1:])
    waves = torch.einsum("kc,bchw->bkhw", colours, rows @ x @ columns.T)
    row, column = (torch.arange(n, dtype=x.dtype, device=x.device) for n in x.shape[2:])
    return waves * 8 / (2 + torch.hypot(row[:, None], column))


def cosines(n: int, *, like: Tensor) -> Tensor:
    """Return the orthonormal DCT-II of n numbers, ``(n, n)``.

    Wave k is cos(pi k (i + 1/2) / n).
    """
    i = torch.arange(n, dtype=like.dtype, device=like.device)
    waves = torch.cos(i[:, None] * (i + 0.5) * (math.pi / n))
    return waves * torch.where(i == 0, 1 / n, 2 / n).sqrt()[:, None]
