"""The two networks of TAEF2, the tiny autoencoder of FLUX.2.

    images (b, 3, h, w) in [0, 1]  <->  latents (b, 32, h / 8, w / 8)

The names of the parameters are those of its files: the number is the place of a layer.
Source: the public repository madebyollin/taesd.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

LATENT_CHANNELS = 32
WIDTH = 64


class Residual(nn.Module):
    """Return ``relu(x + conv(x))``, with three convolutions of 3 x 3.

    Args:
        has_pool: whether ``x + pool(x)``, which compares channels over the whole image, comes
            first.
    """

    def __init__(self, *, has_pool: bool = False) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
        )
        self.pool: nn.Module | None = None
        if has_pool:
            self.pool = nn.Sequential(
                nn.Conv2d(WIDTH, 4 * WIDTH, 1, bias=False),
                nn.GroupNorm(4, 4 * WIDTH),
                nn.ReLU(),
                nn.Conv2d(4 * WIDTH, WIDTH, 1, bias=False),
            )

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Return ``(b, c, h, w)`` of ``x (b, c, h, w)``."""
        if self.pool is not None:
            x = x + self.pool(x)
        return F.relu(x + self.conv(x))


class SoftClamp(nn.Module):
    """Bound latents smoothly to (-3, 3)."""

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Return ``3 tanh(x / 3)``."""
        return 3 * torch.tanh(x / 3)


def make_encoder() -> nn.Sequential:
    """Return the network from images in [0, 1] to latents."""
    layers: list[nn.Module] = [nn.Conv2d(3, WIDTH, 3, padding=1), Residual()]
    for has_pool in (False, False, True):
        layers.append(nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1, bias=False))
        layers += [Residual(has_pool=has_pool) for _ in range(3)]
    return nn.Sequential(*layers, nn.Conv2d(WIDTH, LATENT_CHANNELS, 3, padding=1))


def make_decoder() -> nn.Sequential:
    """Return the network from latents to images, of which it may leave [0, 1]."""
    layers: list[nn.Module] = [SoftClamp(), nn.Conv2d(LATENT_CHANNELS, WIDTH, 3, padding=1)]
    layers.append(nn.ReLU())
    for has_pool in (True, False, False):
        layers += [Residual(has_pool=has_pool) for _ in range(3)]
        layers.append(nn.Upsample(scale_factor=2))
        layers.append(nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False))
    return nn.Sequential(*layers, Residual(), nn.Conv2d(WIDTH, 3, 3, padding=1))
