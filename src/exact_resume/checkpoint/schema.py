"""What older versions called weights and code, and what these are called today.

A state of format f is read with ``RENAMED[f]``, then with ``RENAMED[f + 1]``, up to the format that
is written today. An application that renames a weight, a config key or a class raises
``store.FORMAT`` and adds a row to ``RENAMED``.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from exact_resume.fingerprint import flatten


@dataclass(frozen=True)
class Renamed:
    """What changed its name after one format.

    Attributes:
        weights: consecutive parts of a weight's dotted name, such as ``backbone.stem``; wherever
            they stand in it.
        targets: the beginning of a ``_target_``, such as ``sturdy.backbone.dit``.
        keys: a dotted key of the config, with all below it.
        convert: what else changed in a nested config; it is given a copy and returns the new
            config.
    """

    weights: Mapping[str, str] = field(default_factory=dict)
    targets: Mapping[str, str] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)
    convert: Callable[[dict[str, Any]], dict[str, Any]] | None = None


RENAMED: dict[int, Renamed] = {}  # filled by the application


def modern(state: dict[str, Any], today: int) -> dict[str, Any]:
    """Return a checkpoint's state under today's names; ``state`` itself where nothing was renamed
    since.

    Args:
        state: what ``state.ckpt`` holds. Without an entry ``format`` it is of format 1.
        today: the format that is written now.
    """
    for version in range(state.get("format", 1), today):
        state = _renamed(state, RENAMED.get(version, Renamed())) | {"format": version + 1}
    return state


def modern_config(config: Mapping[str, Any], version: int, today: int) -> dict[str, Any]:
    """Return a nested config that was written in format ``version`` under the names of format
    ``today``.
    """
    for step in range(version, today):
        config = _config(config, RENAMED.get(step, Renamed()))
    return dict(config)


def modern_flat_config(config: Mapping[str, Any], version: int, today: int) -> dict[str, Any]:
    """Do the same for a config with dotted keys."""
    if version == today:
        return dict(config)
    nested: dict[str, Any] = {}
    for key, value in config.items():
        *above, last = key.split(".")
        node = nested
        for part in above:
            node = node.setdefault(part, {})
        node[last] = value
    return flatten(modern_config(nested, version, today))


def _renamed(state: Mapping[str, Any], names: Renamed) -> dict[str, Any]:
    state = dict(state)
    if "state_dict" in state:
        state["state_dict"] = {_weight(k, names): v for k, v in state["state_dict"].items()}
    if "optimizer_states" in state:
        state["optimizer_states"] = [_optimizer(one, names) for one in state["optimizer_states"]]
    if isinstance(state.get("config"), Mapping):
        state["config"] = _config(state["config"], names)
    return state


def _optimizer(state: Mapping[str, Any], names: Renamed) -> dict[str, Any]:
    """Rename the parameters of an optimizer's state that is kept by name."""
    groups = [
        group | {"params": [_weight(name, names) for name in group["params"]]}
        for group in state["param_groups"]
    ]
    return {
        "state": {_weight(k, names): v for k, v in state["state"].items()},
        "param_groups": groups,
    }


def _weight(name: str, names: Renamed) -> str:
    for old, new in names.weights.items():
        name = f".{name}.".replace(f".{old}.", f".{new}.").strip(".")
    return name


def _config(config: Mapping[str, Any], names: Renamed) -> dict[str, Any]:
    moved: dict[str, Any] = deepcopy(dict(config))
    for old, new in names.keys.items():
        *above, last = old.split(".")
        node = moved
        for key in above:
            node = node.get(key) or {}
        if last not in node:
            continue
        value = node.pop(last)
        *above, last = new.split(".")
        node = moved
        for key in above:
            node = node.setdefault(key, {})
        node[last] = value
    moved = _targets(moved, names)
    return names.convert(moved) if names.convert else moved


def _targets(node: Any, names: Renamed) -> Any:
    if isinstance(node, list | tuple):
        return type(node)([_targets(value, names) for value in node])
    if not isinstance(node, dict):
        return node
    return {
        k: _target(str(v), names) if k == "_target_" else _targets(v, names)
        for k, v in node.items()
    }


def _target(target: str, names: Renamed) -> str:
    for old, new in names.targets.items():
        if target == old or target.startswith(old + "."):
            target = new + target.removeprefix(old)
    return target
