"""Write a tiny Stable Diffusion with random weights as a folder of diffusers."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sturdy.pretrained.tokenizer import TEXT_LENGTH, build_tokenizer, find_merges, read_merges

if TYPE_CHECKING:
    from torch import nn

os.environ["HF_HUB_OFFLINE"] = "1"  # before the first import of diffusers

FAMILIES = ("sd1", "sd2", "sdxl")
WIDTH = 32  # of the narrowest layer: each of the 32 groups of a norm has at least one channel
TEXT_WIDTH = 32
TEXT_LAYERS = {"sd1": (2,), "sd2": (23,), "sdxl": (2, 3)}  # Stable Diffusion 2 has 23, too
SIZE_WIDTH = 8  # SDXL: numbers that each of the six sizes of a picture becomes


def build(
    out: Path,
    family: str = "sd1",
    vocabulary: Path | None = None,
    seed: int = 0,
    prediction: str = "epsilon",
) -> None:
    """Write the folder: ``unet``, ``vae``, text encoders, tokenizers, ``scheduler`` and their list.

    Equal arguments give equal weights. Where CLIP's merges are not at hand, a token is a byte.

    Args:
        out: the folder; files that are there are replaced.
        family: "sd1", "sd2" or "sdxl".
        vocabulary: CLIP's file ``bpe_simple_vocab_16e6.txt.gz``. By default it is taken from the
            package open-clip-torch, where that is installed.
        seed: of the weights.
        prediction: what the scheduler says that the U-Net predicts: "epsilon" or "v_prediction".

    Raises:
        ValueError: for another family.
    """
    if family not in FAMILIES:
        raise ValueError(f"family={family} must be one of {', '.join(FAMILIES)}")
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    merges_file = vocabulary or find_merges()
    merges = read_merges(merges_file) if merges_file else []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = make_unet(family)
        vae = make_vae(family)
    parts: dict[str, Any] = {"unet": unet, "vae": vae}
    for number, layers in enumerate(TEXT_LAYERS[family]):
        suffix = f"_{number + 1}" if number else ""
        pad = "!" if number or family == "sd2" else "<|endoftext|>"
        tokenizer = build_tokenizer(merges, pad)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1 + number)
            text_encoder = make_text_encoder(family, number, layers, len(tokenizer))
        parts[f"tokenizer{suffix}"] = tokenizer
        parts[f"text_encoder{suffix}"] = text_encoder
    parts["scheduler"] = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction,
    )
    out.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        part.save_pretrained(out / name)
    index = make_index(family, parts)
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def make_unet(family: str) -> nn.Module:
    """Return a U-Net with the levels of the family, ten to forty times as narrow."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    if family == "sdxl":
        return UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(WIDTH, WIDTH, 2 * WIDTH),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=[1, 1, 2],
            cross_attention_dim=2 * TEXT_WIDTH,
            attention_head_dim=[1, 1, 1],  # the number of heads, despite its name
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=SIZE_WIDTH,
            projection_class_embeddings_input_dim=6 * SIZE_WIDTH + TEXT_WIDTH,
        )
    is_sd2 = family == "sd2"
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(WIDTH, WIDTH, 2 * WIDTH, 2 * WIDTH),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=[1, 1, 1, 1] if is_sd2 else 8,  # the number of heads, despite its name
        use_linear_projection=is_sd2,
    )


def make_vae(family: str) -> nn.Module:
    """Return an autoencoder that makes 4 channels of an eighth of the side."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    return AutoencoderKL(
        sample_size=64,
        block_out_channels=(WIDTH, WIDTH, WIDTH, 2 * WIDTH),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        scaling_factor=0.13025 if family == "sdxl" else 0.18215,
    )


def make_text_encoder(family: str, number: int, layers: int, tokens: int) -> nn.Module:
    """Return text encoder ``number``; the second of SDXL also projects the whole text."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    is_first = number == 0 and family != "sd2"
    config = CLIPTextConfig(
        vocab_size=tokens,
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=1,
        max_position_embeddings=TEXT_LENGTH,
        projection_dim=TEXT_WIDTH,
        hidden_act="quick_gelu" if is_first else "gelu",
        pad_token_id=tokens - 1 if is_first else 0,
        bos_token_id=tokens - 2,
        eos_token_id=tokens - 1,
    )
    return CLIPTextModelWithProjection(config) if number else CLIPTextModel(config)


def make_index(family: str, parts: dict[str, Any]) -> dict[str, Any]:
    """Return the content of ``model_index.json``: which class reads which folder."""
    pipeline = "StableDiffusionXLPipeline" if family == "sdxl" else "StableDiffusionPipeline"
    optional = ["feature_extractor", "image_encoder"]
    if family != "sdxl":
        optional.append("safety_checker")
    index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": "0.42.1"}
    for name, part in parts.items():
        library = type(part).__module__.split(".")[0]
        index[name] = [library, type(part).__name__]
    for name in optional:
        index[name] = [None, None]
    return index


def main() -> None:
    """Read the arguments and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write")
    parser.add_argument("--family", choices=FAMILIES, default="sd1")
    parser.add_argument("--vocabulary", type=Path, help="CLIP's bpe_simple_vocab_16e6.txt.gz")
    arguments = parser.parse_args()
    build(arguments.out, arguments.family, arguments.vocabulary)
    print(f"{arguments.out}: {arguments.family}, random weights")


if __name__ == "__main__":
    main()
