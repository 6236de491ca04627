"""What a network takes from a file and never trains: it is shared, not saved, and put back.

A part of a network that has a base, such as ``sturdy.pretrained.borrowed.Borrowed``, has two
methods. ``frozen_names()`` names its tensors that are not trained; its ``state_dict`` leaves them
out, and its ``load_state_dict`` keeps them. ``load_base(fresh=...)`` reads them from the file, and
refuses a file that has changed. So they are in no checkpoint, no average and no snapshot.

All other tensors are saved, trained or not.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, TypeVar

from torch import nn

from sturdy.errors import add_key

Network = TypeVar("Network", bound=nn.Module)
BASE_KEYS = ("path", "part", "sha256", "dtype")


def frozen_names(network: nn.Module) -> frozenset[str]:
    """Return the names of the tensors in ``network`` that a base puts back."""
    names = set()
    for path, part in network.named_modules():
        if hasattr(part, "frozen_names"):
            names |= {f"{path}.{name}".lstrip(".") for name in part.frozen_names()}  # type: ignore[operator]
    return frozenset(names)


def copy_trained(network: Network) -> Network:
    """Return a copy of ``network`` that shares the tensors that a base puts back."""
    names = frozen_names(network)
    shared: dict[int, Any] = {}
    for tensors in (network.named_parameters(), network.named_buffers()):
        shared |= {id(tensor): tensor for name, tensor in tensors if name in names}
    return deepcopy(network, shared)


def load_base(network: nn.Module, *, fresh: bool) -> None:
    """Load the base of each part of ``network`` that has one.

    Args:
        network: is changed.
        fresh: whether no checkpoint follows. If one does, only what it lacks is read.

    Raises:
        ValueError: a base is missing, has changed or is of another network.
    """
    part: Any
    for part in network.modules():
        if hasattr(part, "load_base"):
            try:
                part.load_base(fresh=fresh)  # type: ignore[operator]
            except ValueError as error:
                raise ValueError(add_key(str(error), "backbone.base", BASE_KEYS)) from None


def move_files(config: Mapping[str, Any], key: str, place: str) -> dict[str, Any]:
    """Return the config of a run one of whose files was moved.

    Args:
        config: resolved, nested primitives.
        key: ``base``, whose parts move with it; or ``space`` or ``condition`` alone.
        place: where the files lie now.

    Raises:
        ValueError: the run has no such files.
    """
    node = config.get(key)
    if key == "base":
        node = node or config["backbone"].get("base")
    before = (node or {}).get("path")
    if before is None:
        raise ValueError(f"{key}.path={place}: this run has no {key} with a path")
    if key == "base":
        return _replaced(config, before, place)
    return {**config, key: {**config[key], "path": place}}


def _replaced(node: Any, before: str, now: str) -> Any:
    """Copy nested primitives with ``now`` for each ``path`` that is ``before``."""
    if isinstance(node, Mapping):
        moved = {}
        for key, value in node.items():
            is_place = key == "path" and value == before
            moved[key] = now if is_place else _replaced(value, before, now)
        return moved
    return node
