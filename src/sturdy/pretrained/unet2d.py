"""The plain U-Net of diffusers as a backbone, from scratch."""

import math
from collections.abc import Sequence

from sturdy.pretrained.borrowed import Borrowed


class UNet2D(Borrowed):
    """diffusers' UNet2DModel, from scratch: it can be written as a folder that diffusers reads.

    Args:
        image_channels: c of x_0.
        num_classes: 0 for none; the network embeds one more, the null label.
        conditions: numbers that tell how an image was augmented; the network takes none.
        width: channels of the first level.
        multipliers: of the width, one a level; each level halves the image.
        blocks: residual blocks a level.
        attention: whether a level has attention, one a level.
        head_dim: channels of a head.
        dropout: in the residual blocks.
        checkpoint: as of ``Borrowed``.

    Raises:
        ValueError: the arguments do not go together.
    """

    def __init__(
        self,
        *,
        image_channels: int = 3,
        num_classes: int = 0,
        conditions: int = 0,
        width: int = 64,
        multipliers: Sequence[int] = (1, 2, 2),
        blocks: int = 2,
        attention: Sequence[bool] = (False, False, True),
        head_dim: int = 32,
        dropout: float = 0.0,
        checkpoint: bool = False,
    ) -> None:
        if len(multipliers) != len(attention):
            raise ValueError(
                f"multipliers={list(multipliers)} and attention={list(attention)} must have one "
                f"value for each level"
            )
        if conditions:
            raise ValueError(
                "conditions: UNet2DModel cannot be told how images were augmented; use "
                "backbone=unet, or train without data.augment"
            )
        channels = [width * multiplier for multiplier in multipliers]
        config = {
            "in_channels": image_channels,
            "out_channels": image_channels,
            "num_class_embeds": num_classes + 1 if num_classes else None,
            "block_out_channels": channels,
            "layers_per_block": blocks,
            "down_block_types": ["AttnDownBlock2D" if a else "DownBlock2D" for a in attention],
            "up_block_types": ["AttnUpBlock2D" if a else "UpBlock2D" for a in attention][::-1],
            "attention_head_dim": head_dim,
            "norm_num_groups": math.gcd(32, *channels),
            "dropout": dropout,
        }
        super().__init__(network="UNet2DModel", config=config, checkpoint=checkpoint)
