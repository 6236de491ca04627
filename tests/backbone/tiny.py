"""Backbones small enough to test, by kind."""

import torch
from torch import nn

from sturdy.backbone import DiT, UNet


def unet(**changes) -> UNet:
    sizes = {
        "width": 8,
        "multipliers": (1, 2),
        "blocks": 1,
        "attention": (False, True),
        "head_dim": 8,
    }
    return UNet(**(sizes | changes))


def dit(**changes) -> DiT:
    return DiT(**({"width": 16, "depth": 2, "heads": 2} | changes))


def awake(backbone: nn.Module) -> nn.Module:
    """Give the layers that start at zero small weights, so that everything has an effect."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if not parameter.any():
                parameter.normal_(std=0.2, generator=rng)
    return backbone
