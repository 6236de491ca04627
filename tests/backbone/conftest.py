import pytest
import torch

from sturdy.backbone import DiT, UNet

TINY = {
    "unet": lambda **kw: UNet(
        **{"width": 8, "multipliers": (1, 2), "blocks": 1, "attention": (False, True), "head_dim": 8} | kw
    ),
    "dit": lambda **kw: DiT(**{"width": 16, "depth": 2, "heads": 2} | kw),
}


@pytest.fixture(params=sorted(TINY))
def tiny(request):
    """A maker of tiny backbones, for each of the two kinds."""
    torch.manual_seed(0)
    return TINY[request.param]


def awaken(backbone: torch.nn.Module) -> torch.nn.Module:
    """Give the zero-initialised layers small weights, so that everything has an effect."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1, generator=rng)
    return backbone
