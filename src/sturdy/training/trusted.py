"""What a file may have built: code of ours, named in plain. A checkpoint must not choose what is executed."""

from collections.abc import Iterator, Mapping
from typing import Any

from hydra.utils import get_object


def strangers(node: Any, rooms: tuple[str, ...], *, kinds: tuple[type, ...] = (type,)) -> Iterator[str]:
    """Yield what must not be handed to Hydra, anywhere in ``node``, a config as primitives.

    That is a ``_target_`` which is nothing defined in ``rooms`` (``sturdy.diffusion.``) or none of ``kinds``, and any
    ``${...}``, which Hydra would fill in, and with what is filled in could be built, too.
    """
    if isinstance(node, str) and "${" in node:
        yield node
    if isinstance(node, Mapping) and "_target_" in node and not _is_of(str(node["_target_"]), rooms, kinds):
        yield str(node["_target_"])
    for value in node.values() if isinstance(node, Mapping) else node if isinstance(node, list | tuple) else ():
        yield from strangers(value, rooms, kinds=kinds)


def _is_of(target: str, rooms: tuple[str, ...], kinds: tuple[type, ...]) -> bool:
    if not target.startswith(rooms):
        return False
    try:
        found = get_object(target)
    except (ImportError, ValueError, AttributeError):
        return False
    return isinstance(found, kinds) and f"{found.__module__}.".startswith(rooms)
