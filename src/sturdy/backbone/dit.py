"""A diffusion transformer: patches as tokens, modulated by time and label through adaLN-zero.

    x = x + gate(c) f(norm(x) (1 + scale(c)) + shift(c)),   f: attention, then SwiGLU
    the gates start at zero

DiT (Peebles and Xie 2023, "Scalable Diffusion Models with Transformers", section 3.2) with RMSNorm
(Zhang and Sennrich 2019), normalised queries and keys (Henry et al. 2020), SwiGLU (Shazeer 2020)
and rotary positions in two dimensions (Su et al. 2021, eq. 34). Rotary positions give tokens their
distance, but not their place in the image, so an MLP of the same angles is added to the patches.
All of it is computed from (h, w): no image size is built in.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sturdy.backbone.embed import ConditionEmbedding, block_at, checkpointed_call, zero_init


def rotation(
    height: int, width: int, head_dim: int, *, like: Tensor, base: float = 100.0
) -> Tensor:
    """Return cosine and sine of each token's angles, ``(2, height * width, 1, 1, head_dim / 2)``.

    The first half of the angles grows with the row, the second with the column, at frequencies from
    1 down to ``1 / base``. Images are tens of tokens wide and texts thousands, hence not the usual
    base of 10,000.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    n = head_dim // 4
    frequency = base ** (-torch.arange(n, dtype=dtype, device=like.device) / n)
    row = torch.arange(height, dtype=dtype, device=like.device)[:, None, None] * frequency
    column = torch.arange(width, dtype=dtype, device=like.device)[None, :, None] * frequency
    angle = torch.cat([row.expand(height, width, n), column.expand(height, width, n)], dim=2)
    return torch.stack([angle.cos(), angle.sin()]).reshape(2, height * width, 1, 1, 2 * n)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate pair i of the head's channels, ``(x[i], x[i + head_dim / 2])``, by angle i.

    Products of rotated tokens depend on their distance only: <R_m q, R_n k> = <q, R_(n - m) k>.

    Args:
        x: ``(b, tokens, ..., heads, head_dim)``.
        rope: from ``rotation``.
    """
    a, b = x.chunk(2, dim=-1)
    cos, sin = rope
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Attention(nn.Module):
    """Attention of every token to every token, ``(b, tokens, width) -> (b, tokens, width)``."""

    def __init__(self, width: int, *, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        """Return the output projection of the attended values."""
        h = F.scaled_dot_product_attention(*self.queries_keys_values(x, rope))
        return self.out(h.transpose(1, 2).flatten(2))

    def queries_keys_values(self, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v, ``(b, heads, tokens, head_dim)`` each; tokens row by row."""
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))  # (b, tokens, 3, heads, head_dim)
        qk, v = qkv.split([2, 1], dim=2)
        qk = rotate(F.rms_norm(qk, qk.shape[-1:], eps=1e-6), rope).to(v.dtype)
        q, k = qk.transpose(1, 3).unbind(2)
        return q, k, v.squeeze(2).transpose(1, 2)


class SwiGLU(nn.Module):
    """``out(silu(gate(x)) * value(x))``, ``(..., width) -> (..., width)``.

    It has two thirds of the usual four widths, as it has three matrices.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = 32 * round(width * 8 / 3 / 32)
        self.gate_value = nn.Linear(width, 2 * hidden)
        self.out = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the gated MLP of ``x``."""
        gate, value = self.gate_value(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * value)


class Block(nn.Module):
    """Attention and SwiGLU, ``x (b, tokens, width), c (b, width), rope -> (b, tokens, width)``."""

    def __init__(self, width: int, *, heads: int, dropout: float) -> None:
        super().__init__()
        self.modulation = zero_init(nn.Linear(width, 6 * width))
        self.attention = Attention(width, heads=heads)
        self.mlp = SwiGLU(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, c: Tensor, rope: Tensor) -> Tensor:
        """Return ``x`` plus both branches; see the equation of this file."""
        scale1, shift1, gate1, scale2, shift2, gate2 = self.modulation(c)[:, None].chunk(6, dim=2)
        x = x + gate1 * self.dropout(self.attention(modulate(x, scale1, shift1), rope))
        return x + gate2 * self.dropout(self.mlp(modulate(x, scale2, shift2)))


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Normalise ``x`` over the channels (RMSNorm), with gain and shift from the condition."""
    return F.rms_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class DiT(nn.Module):
    """``(x, t, label) -> (b, c, h, w)``, zero at the start of training.

    Args:
        image_channels: channels of the image.
        num_classes: number of labels; 0 ignores labels. Index ``num_classes``, or None, is the null
            label.
        conditions: length of the augmentation that the network is told of an image; 0 for none.
        patch: side of the square of pixels that makes a token.
        width: channels of a token.
        depth: number of blocks.
        heads: attention heads; ``width / heads`` must be a multiple of four, for the rotary
            positions.
        dropout: probability of dropping an activation at the end of a branch.
        checkpoint: recompute the blocks in the backward pass: less memory, a third more work, the
            same bits.
        token_features: for subclasses: called with ``width``, it returns a module
            ``x (b, c, h, w), c (b, width) -> (b, tokens, width)`` whose result is added to the
            tokens; ``examples/cars/backbone.py`` uses it.

    Raises:
        ValueError: ``width`` does not fit ``heads``.
    """

    def __init__(
        self,
        *,
        image_channels: int = 3,
        num_classes: int = 0,
        conditions: int = 0,
        patch: int = 2,
        width: int = 256,
        depth: int = 6,
        heads: int = 4,
        dropout: float = 0.0,
        checkpoint: bool = False,
        token_features: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if width % (4 * heads):
            raise ValueError(f"width={width} must be a multiple of 4 * heads = {4 * heads}")
        self.checkpoint = checkpoint
        self.image_channels = image_channels
        self.patch = patch
        self.head_dim = width // heads
        self.condition = ConditionEmbedding(
            width, features=width, num_classes=num_classes, conditions=conditions
        )
        self.stem = nn.Linear(image_channels * patch**2, width)
        self.pos_embed = nn.Sequential(
            nn.Linear(self.head_dim, width), nn.SiLU(), zero_init(nn.Linear(width, width))
        )
        self.token_features = token_features(width) if token_features else None
        self.blocks = nn.ModuleList(
            Block(width, heads=heads, dropout=dropout) for _ in range(depth)
        )
        self.modulation = zero_init(nn.Linear(width, 2 * width))
        self.out = zero_init(nn.Linear(width, image_channels * patch**2))

    def forward(
        self, x: Tensor, t: Tensor, label: Tensor | None = None, augmentation: Tensor | None = None
    ) -> Tensor:
        """Predict the target.

        Args:
            x: noisy images, ``(b, c, h, w)``; h and w multiples of ``patch``.
            t: times in [0, 1], ``(b,)``.
            label: int64 in [0, num_classes], ``(b,)``; None is the null label.
            augmentation: ``(b, conditions)``; None is zeros, an image that is not augmented.

        Raises:
            ValueError: the sizes of the image do not fit.
            IndexError: a label is out of range (on a GPU: a device-side assertion).
        """
        self._check_size(x)
        c = self.condition(t, label, augmentation)
        h = F.pixel_unshuffle(x, self.patch)  # (b, c patch^2, h / patch, w / patch)
        grid = h.shape[2:]
        rope = rotation(grid[0], grid[1], self.head_dim, like=x)
        angles = rope.to(x.dtype).transpose(0, 1).flatten(1)  # (tokens, head_dim)
        h = self.stem(h.flatten(2).transpose(1, 2)) + self.pos_embed(angles)
        if self.token_features is not None:
            h = h + self.token_features(x, c)
        h = h.to(x.dtype)  # under autocast the residual sum stays in float32
        for block in self.blocks:
            h = checkpointed_call(block, h, c, rope, recompute=self.checkpoint)
        scale, shift = self.modulation(c)[:, None].chunk(2, dim=2)
        h = self.out(modulate(h, scale, shift))
        return F.pixel_shuffle(h.transpose(1, 2).unflatten(2, grid), self.patch).to(x.dtype)

    def inner(self, depth: int | None = None) -> tuple[nn.Module, int]:
        """Return block ``depth``, from 1 on, and the channels c of its tokens ``(b, n, c)``.

        None is the last block of the first third: REPA (Yu et al. 2024) takes the 8th of 24 or 28.

        Raises:
            ValueError: there is no such block.
        """
        depth = max(1, round(len(self.blocks) / 3)) if depth is None else depth
        return block_at(self.blocks, depth), self.stem.out_features

    def _check_size(self, x: Tensor) -> None:
        channels, height, width = x.shape[1:]
        if channels != self.image_channels:
            raise ValueError(
                f"the images have {channels} channels, not image_channels={self.image_channels}"
            )
        if height % self.patch or width % self.patch:
            raise ValueError(
                f"the size of the images must be a multiple of patch={self.patch}, not {height} x "
                f"{width}"
            )
