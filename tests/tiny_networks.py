"""Tiny networks of diffusers with random weights, and bases of them on disk."""

from pathlib import Path
from typing import Any

from exact_resume.randomness import reseed
from examples.cars.source import Cars
from runs import COMMON
from sturdy.pretrained.borrowed import build_network, read_base

_BLOCKS: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
_PIXELS = _BLOCKS | {
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 8,
}
_TEXT = _BLOCKS | {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 2,
    "cross_attention_dim": 12,
}
CLASSES = len(Cars.classes)
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "unconditional": ("UNet2DModel", _PIXELS),
    "classes": ("UNet2DModel", _PIXELS | {"num_class_embeds": CLASSES + 1}),
    "text": ("UNet2DConditionModel", _TEXT),
    "sdxl": (
        "UNet2DConditionModel",
        _TEXT
        | {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 5 + 6 * 4,
        },
    ),
    "dit": (
        "DiTTransformer2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 3,
            "out_channels": 6,  # and a variance
            "num_layers": 2,
            "sample_size": 16,
            "patch_size": 4,
            "num_embeds_ada_norm": CLASSES,
            "norm_num_groups": 4,
        },
    ),
}


def write_base(folder: Path, name: str = "unconditional", seed: int = 0) -> dict[str, Any]:
    """Write a network with random weights as a diffusers folder; return how a config names it."""
    reseed("base", seed)
    network = build_network(*NETWORKS[name])
    for parameter in network.parameters():  # some layers begin at zero, and would hide an error
        parameter.data.add_(0.05 * parameter.data.new_empty(parameter.shape).normal_())
    network.save_pretrained(folder / "unet")
    return {"path": str(folder), "part": "unet", "sha256": read_base(str(folder), "unet")[1]}


def _hydra(value) -> str:
    """Return primitives as they are typed on the command line."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{_hydra(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(_hydra(v) for v in value) + "]"
    return "null" if value is None else str(value)


def adapter_words(folder: Path, dropout: float = 0.3, rank: int = 2, **base) -> list[str]:
    """Return the overrides of a run that trains an adapter for the base in ``folder``."""
    if not (folder / "unet").exists():
        write_base(folder, "classes")
    kind, config = NETWORKS["classes"]
    named = {"path": str(folder), "sha256": read_base(str(folder), "unet")[1]} | base
    lora = {"rank": rank, "dropout": dropout}
    return [
        *(word for word in COMMON if not word.startswith("backbone.")),
        "backbone=borrowed",
        f"backbone.network={kind}",
        f"backbone.config={_hydra(config)}",
        f"backbone.base={_hydra(named)}",
        f"backbone.lora={_hydra(lora)}",
        f"num_classes={CLASSES}",
        "schedule=scaled_linear",
        "target=noise",
        "objective=discrete",
        "learning_rate.warmup=2",
        "optimizer.lr=0.01",
    ]
