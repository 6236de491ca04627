"""Networks: ``backbone(x (b, c, h, w), t (b,) in [0, 1], label (b,) or None) -> (b, c, h, w)``."""

from sturdy.backbone.dit import DiT
from sturdy.backbone.unet import UNet

__all__ = ["DiT", "UNet"]
