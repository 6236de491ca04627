"""The network of a run as diffusers has it: in float32, without our wrapper and without adapters.

W' = W + alpha / rank B A
"""

from typing import Any

from sturdy.pretrained.borrowed import Borrowed, build_network
from sturdy.pretrained.lora import MARK, original_name


def use_float32(backbone: Borrowed) -> None:
    """Convert a network to float32; a frozen base is read from its file again.

    Raises:
        ValueError: the base is missing or has changed.
    """
    if backbone.base is not None and backbone.base.dtype != "float32":
        backbone.network.float()
        backbone.load_base(fresh=False)


def has_adapter(backbone: Borrowed) -> bool:
    """Whether an adapter was trained, and not the network itself."""
    return any(MARK in name for name, _ in backbone.network.named_parameters())


def merge_adapter(backbone: Borrowed) -> Any:
    """Add an adapter to the weights of its layers; return the network of diffusers.

    ``backbone`` has this network from then on.
    """
    if not has_adapter(backbone):
        return backbone.network
    from peft.tuners.tuners_utils import BaseTunerLayer

    network: Any = backbone.network
    for layer in network.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
    state = {}
    for name, tensor in network.state_dict().items():
        if MARK not in name:
            state[original_name(name)] = tensor
    plain = build_network(backbone.kind, network.config)
    plain.load_state_dict(state, assign=True)
    backbone.frozen = frozenset()
    backbone.network = plain.requires_grad_(False).eval()
    return backbone.network
