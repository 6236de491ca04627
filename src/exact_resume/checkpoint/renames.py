"""Read a checkpoint of an older format: rename its weights, classes and config keys.

A state of format f is read with ``RENAMED[f]``, then with ``RENAMED[f + 1]``, up to today's
``schema.FORMAT``. Whoever renames a weight, a config key or a class raises ``schema.FORMAT`` and
adds a row to ``RENAMED``.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from exact_resume.checkpoint import schema
from exact_resume.fingerprint import flatten


@dataclass(frozen=True)
class Renamed:
    """The names that changed after one format.

    Attributes:
        weights: old to new name of a weight, or of consecutive parts of its dotted name, such as
            ``backbone.stem``; wherever they stand in it.
        targets: old to new beginning of a ``_target_``, such as ``sturdy.backbone.dit``.
        keys: old to new dotted key of the config, with all keys below it.
        convert: makes any other change to a nested config. It is called with a copy, after the
            other changes, and returns the new config.
    """

    weights: Mapping[str, str] = field(default_factory=dict)
    targets: Mapping[str, str] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)
    convert: Callable[[dict[str, Any]], dict[str, Any]] | None = None


RENAMED: dict[int, Renamed] = {}  # by format; the application adds its own


def rename_state(state: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a ``state.ckpt`` under today's names.

    A state without an entry ``format`` is of format 1. ``state`` itself is left as it is.
    """
    for version in range(state.get("format", 1), schema.FORMAT):
        state = _rename_state(state, RENAMED.get(version, Renamed())) | {"format": version + 1}
    return state


def rename_manifest(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest whose fingerprint has its config under today's names."""
    fingerprint = manifest.get("fingerprint")
    if not isinstance(fingerprint, dict) or manifest["format"] == schema.FORMAT:
        return manifest
    config = rename_flat_config(fingerprint.get("config", {}), manifest["format"])
    return manifest | {"fingerprint": fingerprint | {"config": config}}


def rename_config(config: Mapping[str, Any], version: int) -> dict[str, Any]:
    """Return a nested config of format ``version`` under today's names."""
    for older in range(version, schema.FORMAT):
        config = _rename_config(config, RENAMED.get(older, Renamed()))
    return dict(config)


def rename_flat_config(config: Mapping[str, Any], version: int) -> dict[str, Any]:
    """Return a config with dotted keys of format ``version`` under today's names."""
    nested: dict[str, Any] = {}
    for key, value in config.items():
        _set_key(nested, key, value)
    return flatten(rename_config(nested, version))


def _rename_state(state: Mapping[str, Any], names: Renamed) -> dict[str, Any]:
    state = dict(state)
    if "state_dict" in state:
        state["state_dict"] = _rename_keys(state["state_dict"], names)
    if "optimizer_states" in state:
        optimizers = state["optimizer_states"]
        state["optimizer_states"] = [_rename_optimizer(one, names) for one in optimizers]
    if isinstance(state.get("config"), Mapping):
        state["config"] = _rename_config(state["config"], names)
    return state


def _rename_optimizer(optimizer: Mapping[str, Any], names: Renamed) -> dict[str, Any]:
    """Rename the parameters of an optimizer whose state is kept by name."""
    groups = []
    for group in optimizer["param_groups"]:
        params = [_rename_weight(name, names) for name in group["params"]]
        groups.append(group | {"params": params})
    return {"state": _rename_keys(optimizer["state"], names), "param_groups": groups}


def _rename_keys(values: Mapping[Any, Any], names: Renamed) -> dict[Any, Any]:
    return {_rename_weight(name, names): value for name, value in values.items()}


def _rename_weight(name: Any, names: Renamed) -> Any:
    if not isinstance(name, str):  # Lightning's own optimizer states number the parameters
        return name
    for old, new in names.weights.items():
        name = f".{name}.".replace(f".{old}.", f".{new}.").strip(".")
    return name


def _rename_config(config: Mapping[str, Any], names: Renamed) -> dict[str, Any]:
    renamed: dict[str, Any] = deepcopy(dict(config))
    for old, new in names.keys.items():
        *above, last = old.split(".")
        node = renamed
        for key in above:
            node = node.get(key) or {}
        if last in node:
            _set_key(renamed, new, node.pop(last))
    renamed = _rename_targets(renamed, names)
    return names.convert(renamed) if names.convert else renamed


def _set_key(nested: dict[str, Any], dotted: str, value: Any) -> None:
    """Set the ``dotted`` key of a nested config, with the nodes above it."""
    *above, last = dotted.split(".")
    node = nested
    for key in above:
        node = node.setdefault(key, {})
    node[last] = value


def _rename_targets(node: Any, names: Renamed) -> Any:
    """Rename each ``_target_`` in ``node``, at any depth."""
    if isinstance(node, list | tuple):
        return type(node)([_rename_targets(value, names) for value in node])
    if not isinstance(node, dict):
        return node
    renamed = {key: _rename_targets(value, names) for key, value in node.items()}
    if "_target_" in node:
        renamed["_target_"] = _rename_target(str(node["_target_"]), names)
    return renamed


def _rename_target(target: str, names: Renamed) -> str:
    for old, new in names.targets.items():
        if target == old or target.startswith(old + "."):
            target = new + target.removeprefix(old)
    return target
