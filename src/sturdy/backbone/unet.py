"""A U-Net with attention: residual blocks on a ladder of resolutions, modulated by time and label.

    h = conv(silu(norm(x)));   y = skip(x) + conv(dropout(silu(norm(h) (1 + scale(c)) + shift(c))))

After ADM (Dhariwal and Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis", section 3).
Every residual branch and the output start at zero. Where the images or the weights are
channels_last, all that follows is.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from sturdy.backbone.embed import ConditionEmbedding, block_at, checkpointed_call, zero_init


class Norm(nn.GroupNorm):
    """GroupNorm with at most 32 groups of at least four channels.

    A group of one channel would erase its mean. Statistics are float32; the result has the type of
    ``x``, as CUDA's autocast would return float32.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(math.gcd(32, channels // 4), channels)

    @override
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to(x.dtype)


class Down(nn.Module):
    """Mean of each 2 x 2 square, ``(b, c, h, w) -> (b, c, h/2, w/2)``."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` at half the size."""
        return F.avg_pool2d(x, 2)


class Up(nn.Module):
    """Each pixel four times, ``(b, c, h, w) -> (b, c, 2h, 2w)``; its backward is deterministic."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` at twice the size."""
        return F.interpolate(x, scale_factor=2.0, mode="nearest")


class Attention(nn.Module):
    """Attention of every pixel to every pixel, ``(b, c, h, w) -> (b, c, h, w)``, residual."""

    def __init__(self, channels: int, *, head_dim: int) -> None:
        super().__init__()
        if channels % head_dim:
            raise ValueError(
                f"head_dim={head_dim} does not divide the {channels} channels of a level"
            )
        self.head_dim = head_dim
        self.norm = Norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zero_init(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` plus the output projection of the attended values."""
        h = F.scaled_dot_product_attention(*self.queries_keys_values(x)).transpose(1, 2).flatten(2)
        return x + self.out(h).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v, ``(b, heads, hw, head_dim)`` each; pixels row by row."""
        h = self.norm(x).permute(0, 2, 3, 1).flatten(1, 2)  # (b, hw, c)
        qkv = self.qkv(h).unflatten(2, (3, -1, self.head_dim))  # (b, hw, 3, heads, head_dim)
        q, k, v = qkv.transpose(1, 3).unbind(2)
        return q, k, v


class Block(nn.Module):
    """Residual block, ``x (b, c_in, h, w), c (b, size) -> (b, c_out, h', w')``.

    ``resample`` changes h and w.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        size: int,
        *,
        dropout: float,
        attention: nn.Module | None = None,
        resample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.resample = resample or nn.Identity()
        self.norm1 = Norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.film = nn.Linear(size, 2 * c_out)
        self.norm2 = Norm(c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)
        self.attention = attention or nn.Identity()

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Return the equation of this file, followed by attention if there is any."""
        h = self.conv1(self.resample(F.silu(self.norm1(x))))
        scale, shift = self.film(c)[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
        h = self.conv2(self.dropout(F.silu(h)))
        return self.attention(self.skip(self.resample(x)) + h)


class UNet(nn.Module):
    """``(x, t, label) -> (b, c, h, w)``, zero at the start of training.

    Args:
        image_channels: channels of the image.
        num_classes: number of labels; 0 ignores labels. Index ``num_classes``, or None, is the null
            label.
        conditions: length of the augmentation that the network is told of an image; 0 for none.
        patch: side of the square of pixels that makes a position of the first level; 2 takes a
            quarter of the work at the same width, as the finest level costs most (Hoogeboom et al.
            2023, "simple diffusion", section 3.3).
        width: channels of the first level, a multiple of four.
        multipliers: channels of each level in units of ``width``; every level after the first
            halves h and w.
        blocks: residual blocks a level on the way down; one more on the way up.
        attention: for each level, whether its blocks end in attention; the middle always has it.
        head_dim: channels of an attention head.
        dropout: probability of dropping an activation inside a residual block.
        checkpoint: recompute the blocks in the backward pass: less memory, a third more work, the
            same bits.

    Raises:
        ValueError: ``attention`` has not one entry a level; ``width`` is no multiple of four;
            ``head_dim`` does not divide the channels of a level.
    """

    def __init__(
        self,
        *,
        image_channels: int = 3,
        num_classes: int = 0,
        conditions: int = 0,
        patch: int = 1,
        width: int = 64,
        multipliers: Sequence[int] = (1, 2, 2),
        blocks: int = 2,
        attention: Sequence[bool] = (False, False, True),
        head_dim: int = 32,
        dropout: float = 0.1,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        if len(attention) != len(multipliers):
            raise ValueError(
                f"attention={list(attention)} must have {len(multipliers)} entries, one for each "
                f"of multipliers={list(multipliers)}"
            )
        if width % 4:
            raise ValueError(f"width={width} must be a multiple of 4")
        self.checkpoint = checkpoint
        self.image_channels = image_channels
        self.patch = patch
        self.levels = len(multipliers)
        size = 4 * width

        def block(
            c_in: int, c_out: int, *, attend: bool = False, resample: nn.Module | None = None
        ) -> Block:
            end = Attention(c_out, head_dim=head_dim) if attend else None
            return Block(c_in, c_out, size, dropout=dropout, attention=end, resample=resample)

        self.condition = ConditionEmbedding(
            size, features=width, num_classes=num_classes, conditions=conditions
        )
        c = width * multipliers[0]
        self.stem = nn.Conv2d(image_channels * patch**2, c, 3, padding=1)
        self.encoder = nn.ModuleList()
        skips = [c]
        for level, (multiplier, attend) in enumerate(zip(multipliers, attention, strict=True)):
            if level:
                self.encoder.append(block(c, c, resample=Down()))
                skips.append(c)
            for _ in range(blocks):
                self.encoder.append(block(c, width * multiplier, attend=attend))
                c = width * multiplier
                skips.append(c)
        self.middle = nn.ModuleList([block(c, c, attend=True), block(c, c)])
        self.decoder = nn.ModuleList()
        self.rise = nn.ModuleList()
        for level in reversed(range(self.levels)):
            channels = width * multipliers[level]
            level_blocks = nn.ModuleList()
            for _ in range(blocks + 1):
                level_blocks.append(block(c + skips.pop(), channels, attend=attention[level]))
                c = channels
            self.decoder.append(level_blocks)
            if level:
                self.rise.append(block(c, c, resample=Up()))
        self.out = nn.Sequential(
            Norm(c), nn.SiLU(), zero_init(nn.Conv2d(c, image_channels * patch**2, 3, padding=1))
        )

    def forward(
        self, x: Tensor, t: Tensor, label: Tensor | None = None, augmentation: Tensor | None = None
    ) -> Tensor:
        """Predict the target.

        Args:
            x: noisy images, ``(b, c, h, w)``; h and w multiples of ``patch * 2 ** (levels - 1)``.
            t: times in [0, 1], ``(b,)``.
            label: int64 in [0, num_classes], ``(b,)``; None is the null label.
            augmentation: ``(b, conditions)``; None is zeros, an image that is not augmented.

        Raises:
            ValueError: the sizes of the image do not fit.
            IndexError: a label is out of range (on a GPU: a device-side assertion).
        """
        self._check_size(x)
        c = self.condition(t, label, augmentation)
        h = self.stem(F.pixel_unshuffle(x, self.patch))
        skips = [h]
        for block in self.encoder:
            h = checkpointed_call(block, h, c, recompute=self.checkpoint)
            skips.append(h)
        for block in self.middle:
            h = checkpointed_call(block, h, c, recompute=self.checkpoint)
        for level, level_blocks in enumerate(self.decoder):
            if level:
                h = checkpointed_call(self.rise[level - 1], h, c, recompute=self.checkpoint)
            for block in level_blocks.children():
                h = torch.cat([h, skips.pop()], dim=1)
                h = checkpointed_call(block, h, c, recompute=self.checkpoint)
        return F.pixel_shuffle(self.out(h), self.patch).to(x.dtype)

    def inner(self, depth: int | None = None) -> tuple[nn.Module, int]:
        """Return block ``depth`` and the channels c of its map ``(b, c, h', w')``.

        Blocks are counted from 1 on, down to the end of the middle. None is the last block before
        the middle.

        Raises:
            ValueError: there is no such block.
        """
        depth = len(self.encoder) if depth is None else depth
        block = block_at([*self.encoder, *self.middle], depth)
        return block, block.conv2.out_channels  # type: ignore[union-attr, return-value]

    def _check_size(self, x: Tensor) -> None:
        multiple = self.patch * 2 ** (self.levels - 1)
        channels, height, width = x.shape[1:]
        if channels != self.image_channels:
            raise ValueError(
                f"the images have {channels} channels, not image_channels={self.image_channels}"
            )
        if height % multiple or width % multiple:
            raise ValueError(
                f"the size of the images must be a multiple of {multiple}, not {height} x {width}: "
                f"choose another size, fewer multipliers or a smaller patch"
            )
