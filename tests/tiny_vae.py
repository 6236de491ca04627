"""A tiny autoencoder with random weights, written as diffusers writes it."""

import torch

CHANNELS = 4
FACTOR = 4


def write_vae(folder, seed=0, **config):
    """Write an ``AutoencoderKL``, which makes images four times smaller; return it."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    levels = {
        "block_out_channels": (8, 8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "norm_num_groups": 4,
        "latent_channels": CHANNELS,
    }
    autoencoder = AutoencoderKL(**(levels | config)).eval()
    autoencoder.save_pretrained(folder)
    return autoencoder
