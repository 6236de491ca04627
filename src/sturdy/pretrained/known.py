"""What a single file of Stable Diffusion does not say about its networks: a few numbers a family.

Widths, depths and sizes are read off the tensors. The rest is here, out of the files
``config.json`` that were published with stable-diffusion-v1-5, stable-diffusion-2,
stable-diffusion-2-1 and stable-diffusion-xl-base-1.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

HEAD_WIDTH = 64  # channels of a head of attention, in each text encoder and in most U-Nets

# `attention_head_dim` of diffusers is the number of heads. Where it is not here, a head has
# `HEAD_WIDTH` channels. `sample_size` is the side of the latents that the model was trained on.
UNETS: dict[str, dict[str, Any]] = {
    "sd1": {"attention_head_dim": 8, "sample_size": 64},
    # A file does not say whether it is version 2.0 or 2.1, and 2.1 overflows in float16 otherwise.
    "sd2": {"upcast_attention": True, "sample_size": 64},
    "sdxl": {"addition_embed_type": "text_time", "sample_size": 128},
}
SD2_V_SAMPLE_SIZE = 96  # Stable Diffusion 2 that predicts v was trained on pictures of 768 pixels

VAES: dict[str, dict[str, Any]] = {
    "sd1": {"scaling_factor": 0.18215, "sample_size": 512},
    "sd2": {"scaling_factor": 0.18215, "sample_size": 768},
    "sdxl": {"scaling_factor": 0.13025, "sample_size": 1024},
}

# The activation of each text encoder: OpenAI's CLIP, or one of OpenCLIP.
ACTIVATIONS = {"sd1": ("quick_gelu",), "sd2": ("gelu",), "sdxl": ("quick_gelu", "gelu")}


def read_unet_config(
    family: str, prediction: str | None, tensors: Mapping[str, Tensor], pooled_width: int = 0
) -> dict[str, Any]:
    """Return the config of a U-Net of ``family``.

    Args:
        family: "sd1", "sd2" or "sdxl".
        prediction: "noise", "v" or None.
        tensors: under the names of diffusers.
        pooled_width: of SDXL, the numbers that its second text encoder makes of a whole text.

    Raises:
        KeyError: with the name of a tensor that is missing.
    """
    widths = _widths(tensors, "down_blocks")
    depths = [
        _count(tensors, f"down_blocks.{level}.attentions.0.transformer_blocks")
        for level in range(len(widths))
    ]
    kinds = ["CrossAttn" if depth else "" for depth in depths]
    attention = f"down_blocks.{kinds.index('CrossAttn') if any(depths) else 0}.attentions.0"
    cross = tensors[f"{attention}.transformer_blocks.0.attn2.to_k.weight"]
    config: dict[str, Any] = {
        "in_channels": tensors["conv_in.weight"].shape[1],
        "out_channels": tensors["conv_out.weight"].shape[0],
        "block_out_channels": widths,
        "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(kinds)],
        "layers_per_block": _count(tensors, "down_blocks.0.resnets"),
        "attention_head_dim": [_heads(width) for width in widths],
        "cross_attention_dim": cross.shape[1],
        "use_linear_projection": tensors[f"{attention}.proj_in.weight"].ndim == 2,
    }
    if max(depths) > 1:
        config["transformer_layers_per_block"] = [max(1, depth) for depth in depths]
    if family == "sdxl":
        given = tensors["add_embedding.linear_1.weight"].shape[1]
        config["projection_class_embeddings_input_dim"] = given
        config["addition_time_embed_dim"] = (given - pooled_width) // 6  # numbers of size and crop
    config |= UNETS[family]
    if family == "sd2" and prediction == "v":
        config["sample_size"] = SD2_V_SAMPLE_SIZE
    return config


def read_vae_config(family: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the config of an autoencoder of ``family``, as ``read_unet_config`` does."""
    widths = _widths(tensors, "encoder.down_blocks")
    return {
        "in_channels": tensors["encoder.conv_in.weight"].shape[1],
        "out_channels": tensors["decoder.conv_out.weight"].shape[0],
        "latent_channels": tensors["decoder.conv_in.weight"].shape[1],
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "layers_per_block": _count(tensors, "encoder.down_blocks.0.resnets"),
        **VAES[family],
    }


def read_text_config(family: str, number: int, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the config of text encoder ``number``.

    Args:
        family: "sd1", "sd2" or "sdxl".
        number: from 0.
        tensors: under the names of transformers, with the prefix ``text_model.``.

    Raises:
        KeyError: with the name of a tensor that is missing.
    """
    tokens, width = tensors["text_model.embeddings.token_embedding.weight"].shape
    projection = tensors.get("text_projection.weight")
    return {
        "vocab_size": tokens,
        "hidden_size": width,
        "intermediate_size": tensors["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "projection_dim": width if projection is None else projection.shape[0],
        "num_hidden_layers": _count(tensors, "text_model.encoder.layers"),
        "num_attention_heads": _heads(width),
        "max_position_embeddings": tensors["text_model.embeddings.position_embedding.weight"].shape[
            0
        ],
        "hidden_act": ACTIVATIONS[family][number],
        "bos_token_id": tokens - 2,
        "eos_token_id": tokens - 1,
    }


def _widths(tensors: Mapping[str, Tensor], blocks: str) -> list[int]:
    """Return the number of channels of each level; there is at least one."""
    levels = range(max(1, _count(tensors, blocks)))
    return [tensors[f"{blocks}.{level}.resnets.0.conv2.weight"].shape[0] for level in levels]


def _count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """Return how many numbers follow ``prefix.`` in the names."""
    prefix += "."
    return len({name[len(prefix) :].split(".")[0] for name in tensors if name.startswith(prefix)})


def _heads(width: int) -> int:
    return max(1, width // HEAD_WIDTH)
