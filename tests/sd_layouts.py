"""Write a Stable Diffusion folder in the other layouts that such models come in.

Single files have the names of the authors of Stable Diffusion ("LDM names"). The tables here go
from the names of diffusers to those; the product goes the other way, with diffusers' own code.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from untrusted_files import fake_classes

UNET = "model.diffusion_model."
VAE = "first_stage_model."
CLIP = {"sd1": "cond_stage_model.transformer.", "sdxl": "conditioner.embedders.0.transformer."}
OPEN_CLIP = {"sd2": "cond_stage_model.model.", "sdxl": "conditioner.embedders.1.model."}

# Beginnings or words of the names: diffusers -> LDM.
UNET_TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
VAE_WORDS = {
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0.group_norm": "mid.attn_1.norm",
    "mid_block.attentions.0.to_q": "mid.attn_1.q",
    "mid_block.attentions.0.to_k": "mid.attn_1.k",
    "mid_block.attentions.0.to_v": "mid.attn_1.v",
    "mid_block.attentions.0.to_out.0": "mid.attn_1.proj_out",
    "conv_shortcut": "nin_shortcut",
    "conv_norm_out": "norm_out",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    "resnets": "block",
}
OPEN_CLIP_WORDS = {
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
    "encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def read_folder(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of each part of a folder that `build` wrote."""
    return {file.parent.name: load_file(file) for file in sorted(folder.glob("*/*.safetensors"))}


def write_file(
    folder: Path,
    path: Path,
    family: str = "sd1",
    *,
    averaged: bool = False,
    lightning: bool = False,
    half: bool = False,
    extra: dict[str, Tensor] | None = None,
    metadata: dict[str, str] | None = None,
) -> Path:
    """Write the folder as a single file, `.safetensors` or `.ckpt`, and return `path`.

    With `averaged`, the U-Net of the folder is the average, and another one is beside it. With
    `lightning`, objects of Lightning are in the pickle, as in the files of its first versions.
    """
    state = ldm_state(read_folder(folder), family)
    if averaged:
        add_average(state)
    state |= extra or {}
    if half:
        state = {name: t.half() if t.is_floating_point() else t for name, t in state.items()}
    if path.suffix == ".safetensors":
        contiguous = {name: tensor.contiguous() for name, tensor in state.items()}
        save_file(contiguous, path, metadata)
        return path
    content: dict[str, Any] = {"state_dict": state, "global_step": 840_000, "epoch": 3}
    if lightning:
        name = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"
        with fake_classes(name) as [checkpoint]:
            callbacks = {checkpoint: {"best_model_score": np.float64(0.5)}}
            torch.save(content | {"callbacks": callbacks}, path)
        return path
    torch.save(content, path)
    return path


def ldm_state(parts: dict[str, dict[str, Tensor]], family: str) -> dict[str, Tensor]:
    """Return the tensors of all parts under LDM names."""
    state = {
        "betas": torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2,
        "scale_factor": torch.tensor(0.18215),
    }
    attends = {n.split(".")[1] for n in parts["unet"] if re.match(r"up_blocks\.\d\.attentions", n)}
    for name, tensor in parts["unet"].items():
        state[UNET + unet_name(name, attends)] = tensor
    for name, tensor in parts["vae"].items():
        is_linear = "attentions" in name and tensor.ndim == 2
        # In LDM the attention of the autoencoder is made of convolutions.
        state[VAE + vae_name(name)] = tensor[:, :, None, None] if is_linear else tensor
    if family in CLIP:
        for name, tensor in parts["text_encoder"].items():
            state[f"{CLIP[family]}text_model.{name.removeprefix('text_model.')}"] = tensor
        positions = torch.arange(77)[None]
        state[f"{CLIP[family]}text_model.embeddings.position_ids"] = positions
    if family in OPEN_CLIP:
        encoder = parts["text_encoder" if family == "sd2" else "text_encoder_2"]
        for name, tensor in open_clip_state(encoder).items():
            state[OPEN_CLIP[family] + name] = tensor
    if family == "sd2":
        add_last_block(state)
    return state


def unet_name(name: str, attends: set[str]) -> str:
    """Return the LDM name; `attends` has the numbers of the up blocks with attention."""
    name = re.sub(r"resnets\.(\d)\.(\w+)", _resnet, name)
    for old, new in UNET_TOP.items():
        if name.startswith(f"{old}."):
            return name.replace(old, new, 1)
    found = re.fullmatch(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", name)
    assert found, name
    side, block, kind, layer, rest = found.groups()
    number = 3 * int(block) + int(layer)
    if kind == "downsamplers":
        return f"input_blocks.{3 * int(block) + 3}.0.{rest.replace('conv', 'op')}"
    if kind == "upsamplers":
        return f"output_blocks.{3 * int(block) + 2}.{2 if block in attends else 1}.{rest}"
    place = f"input_blocks.{number + 1}" if side == "down" else f"output_blocks.{number}"
    return f"{place}.{0 if kind == 'resnets' else 1}.{rest}"


def _resnet(found: re.Match[str]) -> str:
    return f"resnets.{found[1]}.{UNET_RESNET[found[2]]}"


def vae_name(name: str, levels: int = 4) -> str:
    """Return the LDM name."""
    name = re.sub(r"down_blocks\.(\d)", r"down.\1", name)
    name = re.sub(r"up_blocks\.(\d)", lambda found: f"up.{levels - 1 - int(found[1])}", name)
    return _replace(name, VAE_WORDS)


def open_clip_state(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a text encoder under the names of OpenCLIP, where q, k and v are one tensor."""
    state = {"logit_scale": torch.tensor(4.6)}
    for name, tensor in tensors.items():
        name = name.removeprefix("text_model.")
        if name == "text_projection.weight":
            state["text_projection"] = tensor.T
        elif ".q_proj." in name:
            three = [tensors_like(tensors, name, which) for which in "qkv"]
            new = name.replace("self_attn.q_proj.", "attn.in_proj_")
            state[_replace(new, OPEN_CLIP_WORDS)] = torch.cat(three)
        elif ".k_proj." not in name and ".v_proj." not in name:
            state[_replace(name, OPEN_CLIP_WORDS)] = tensor
    return state


def tensors_like(tensors: dict[str, Tensor], name: str, which: str) -> Tensor:
    """Return the tensor of q, k or v beside that of q, whatever the prefix of the names is."""
    name = name.replace(".q_proj.", f".{which}_proj.")
    return tensors[name] if name in tensors else tensors[f"text_model.{name}"]


def add_average(state: dict[str, Tensor]) -> None:
    """Make the U-Net the average, and put another one in its place."""
    for name in [name for name in state if name.startswith(UNET)]:
        state[averaged_name(name)] = state[name]
        state[name] = state[name] + 1
    state["model_ema.decay"] = torch.tensor(0.9999)
    state["model_ema.num_updates"] = torch.tensor(7, dtype=torch.int)


def averaged_name(name: str) -> str:
    """Return the name of the average of a tensor, which has no dots."""
    return "model_ema." + name.removeprefix("model.").replace(".", "")


def add_last_block(state: dict[str, Tensor]) -> None:
    """Add block 24 and the projection, which files of version 2 have and diffusers leaves out."""
    prefix = f"{OPEN_CLIP['sd2']}transformer.resblocks."
    for name in [name for name in state if name.startswith(f"{prefix}22.")]:
        state[name.replace("resblocks.22.", "resblocks.23.")] = state[name] + 1
    width = state[f"{OPEN_CLIP['sd2']}positional_embedding"].shape[1]
    state[f"{OPEN_CLIP['sd2']}text_projection"] = torch.eye(width)


def _replace(name: str, words: dict[str, str]) -> str:
    for old, new in words.items():
        name = name.replace(old, new)
    return name


def write_half_folder(folder: Path, out: Path) -> Path:
    """Write the folder with float16 weights only, under the names of that variant."""
    _copy_without_weights(folder, out)
    for part, tensors in read_folder(folder).items():
        stem = _stem(part)
        half = {name: tensor.half() for name, tensor in tensors.items()}
        save_file(half, out / part / f"{stem}.fp16.safetensors", {"format": "pt"})
    return out


def write_sharded_folder(folder: Path, out: Path) -> Path:
    """Write the folder with two files of weights in each part, and an index."""
    _copy_without_weights(folder, out)
    for part, tensors in read_folder(folder).items():
        stem = _stem(part)
        places = {}
        for number in (0, 1):
            file = f"{stem}-0000{number + 1}-of-00002.safetensors"
            shard = {name: tensors[name] for name in list(tensors)[number::2]}
            save_file(shard, out / part / file, {"format": "pt"})
            places |= dict.fromkeys(shard, file)
        index = {"metadata": {}, "weight_map": places}
        (out / part / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    return out


def write_old_folder(folder: Path, out: Path) -> Path:
    """Write the folder as in 2022: `.bin`, the names of that time, and no prediction_type."""
    _copy_without_weights(folder, out)
    for part, tensors in read_folder(folder).items():
        if part.startswith("text_encoder"):
            tensors = {f"text_model.{n.removeprefix('text_model.')}": t for n, t in tensors.items()}
            tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        if part == "vae":
            words = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
            tensors = {_replace(name, words): tensor for name, tensor in tensors.items()}
        stem = _stem(part).replace("model", "pytorch_model") if part[0] == "t" else _stem(part)
        torch.save(tensors, out / part / f"{stem}.bin")
    scheduler = out / "scheduler" / "scheduler_config.json"
    config = json.loads(scheduler.read_text())
    del config["prediction_type"]
    scheduler.write_text(json.dumps(config))
    for tokenizer in out.glob("tokenizer*"):
        split_tokenizer(tokenizer)
    return out


def split_tokenizer(folder: Path) -> None:
    """Replace `tokenizer.json` by `vocab.json` and `merges.txt`, as before transformers 5."""
    file = folder / "tokenizer.json"
    model = json.loads(file.read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    file.unlink()


def _copy_without_weights(folder: Path, out: Path) -> None:
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors"))


def _stem(part: str) -> str:
    return "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"
