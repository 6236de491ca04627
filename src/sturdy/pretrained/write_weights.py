"""Write weights into single files of safetensors: an adapter, a whole model, or any tensors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sturdy.pretrained.base import open_base
from sturdy.pretrained.borrowed import Borrowed
from sturdy.pretrained.parts import UnusableBaseError
from sturdy.pretrained.single_file import UNET, SingleFile

LORA_FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for
AVERAGES = "model_ema."


def save_tensors(path: Path, tensors: Mapping[str, Tensor], **metadata: str) -> None:
    """Write a file of safetensors."""
    from safetensors.torch import save_file

    copies = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    save_file(copies, path, {"format": "pt", **metadata})


def read_adapter(backbone: Borrowed) -> tuple[dict[str, Tensor], float, int]:
    """Return the matrices of an adapter under the names of peft, its alpha and its rank."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    network: Any = backbone.network
    layers = [layer for layer in network.modules() if isinstance(layer, BaseTunerLayer)]
    first: Any = layers[0]
    state = {}
    for name, tensor in network.state_dict().items():
        if ".lora_" in name:
            state[name.replace(".default.", ".")] = tensor
    return state, float(first.lora_alpha["default"]), int(first.r["default"])


def write_lora(folder: Path, backbone: Borrowed) -> Path:
    """Write an adapter as diffusers does; ``pipe.load_lora_weights(folder)`` reads it.

    The factor alpha / rank is multiplied into B, because many readers of these names take it as 1.
    """
    from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers

    state, alpha, rank = read_adapter(backbone)
    for name in state:
        if ".lora_B." in name:
            state[name] = state[name] * (alpha / rank)
    renamed = convert_state_dict_to_diffusers(state)
    path = folder / LORA_FILE
    save_tensors(path, {f"unet.{name}": tensor for name, tensor in renamed.items()})
    return path


def write_kohya_lora(path: Path, backbone: Borrowed) -> None:
    """Write an adapter as kohya's scripts do, with a tensor ``alpha`` for each layer."""
    from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya

    state, alpha, rank = read_adapter(backbone)
    renamed = convert_state_dict_to_kohya({f"unet.{name}": t for name, t in state.items()})
    for name in renamed:
        if name.endswith(".alpha"):
            renamed[name] = torch.tensor(alpha)
    says = {"ss_network_module": "networks.lora", "ss_network_dim": str(rank)}
    save_tensors(path, renamed, **says, ss_network_alpha=str(alpha))


def write_single_file(path: Path, backbone: Borrowed) -> None:
    """Write the single file of the base again, with the trained U-Net in its place.

    The names of the base's own tensors are used: which of them a tensor of diffusers was read from
    is seen by its memory. The averages of the base are left out.

    Raises:
        UnusableBaseError: the base is a folder, which has no such names.
    """
    assert backbone.base is not None
    base = open_base(backbone.base.path)
    if not isinstance(base, SingleFile):
        raise UnusableBaseError(
            f"base={backbone.base.path} is a folder, and the names of a single file are those of "
            f"its base: use to=diffusers, or base=FILE with the single file of the same weights"
        )
    plain = {name: t for name, t in base.file.tensors.items() if name.startswith(UNET)}
    averaged = base._averaged() if base.has_ema else plain
    old_names = {tensor.data_ptr(): name for name, tensor in averaged.items()}
    trained = backbone.network.state_dict()
    state = {n: t for n, t in base.file.tensors.items() if not n.startswith((UNET, AVERAGES))}
    for name, tensor in base.read("unet").items():
        old = old_names[tensor.data_ptr()]
        state[old] = trained[name].reshape(plain[old].shape)
    save_tensors(path, state, **base.file.metadata)
