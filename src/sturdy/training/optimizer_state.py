"""The state of an optimizer by parameter name: how it is saved, loaded and continued."""

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from exact_resume.checkpoint.store import assert_primitive
from sturdy.training.optim import parameter_groups


def names_in_order(module: nn.Module, groups: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the names of the parameters in the order in which the optimizer numbers them."""
    name_of = {id(p): name for name, p in module.named_parameters()}
    return [name_of[id(p)] for group in groups for p in group["params"]]


def state_by_name(state: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """Return an optimizer's ``state_dict`` keyed by parameter name.

    This is the layout of torch.distributed.checkpoint.
    """
    return {
        "state": {names[i]: values for i, values in state["state"].items()},
        "param_groups": [
            group | {"params": [names[i] for i in group["params"]]}
            for group in state["param_groups"]
        ],
    }


def state_by_index(state: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """Return the inverse of ``state_by_name``.

    Raises:
        ValueError: the state was saved for other parameters; the message names some of them.
    """
    index = {name: i for i, name in enumerate(names)}
    stored = {name for group in state["param_groups"] for name in group["params"]}
    if stored != set(names):
        differ = sorted(stored ^ set(names))
        raise ValueError(
            f"the optimizer state is of another network; parameters that differ: "
            f"{', '.join(differ[:5])}"
        )
    return {
        "state": {index[name]: values for name, values in state["state"].items()},
        "param_groups": [
            group | {"params": [index[name] for name in group["params"]]}
            for group in state["param_groups"]
        ],
    }


def remove_prefix(checkpoint: dict[str, Any], prefix: str) -> None:
    """Remove the weights whose names begin with ``prefix``, and their optimizer state by name."""
    weights = checkpoint.get("state_dict", {})  # the weights of a sharded model are elsewhere
    for name in [name for name in weights if name.startswith(prefix)]:
        del weights[name]
    for state in checkpoint.get("optimizer_states", ()):
        state["state"] = {k: v for k, v in state["state"].items() if not k.startswith(prefix)}
        for group in state["param_groups"]:
            group["params"] = [name for name in group["params"] if not name.startswith(prefix)]


def check_optimizer(make: Callable[..., Optimizer], module: nn.Module) -> None:
    """Make the optimizer of ``module`` once, before any training.

    Raises:
        ValueError: its constructor refuses, or its state has more than tensors and primitives; the
            message names the key.
    """
    kind = getattr(make, "func", make)
    key = f"optimizer {kind.__module__}.{kind.__qualname__}"
    try:
        make(parameter_groups(module))
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:
        raise ValueError(f"{key}: {error}") from None
    try:
        assert_primitive(state_of_matrix(make) or {}, "its state")
    except TypeError as error:
        raise ValueError(f"{key} could not be saved: {error}") from None


def state_of_matrix(make: Callable[..., Optimizer]) -> dict[str, Any] | None:
    """Return the state that the optimizer has for a matrix after its first step.

    None if it cannot take a step here.
    """
    network = nn.ParameterList([torch.ones(4, 4), torch.ones(4)])
    for p in network.parameters():
        p.grad = torch.ones_like(p)
    try:
        optimizer = make(parameter_groups(network))
        optimizer.step()
    except Exception:  # it may want a GPU, or other shapes
        return None
    return dict(optimizer.state[network[0]])


def continue_state(
    stored: Mapping[str, Any],
    fresh: Mapping[str, Any],
    make: Callable[..., Optimizer],
    then: Mapping[str, Any],
    now: Mapping[str, Any],
) -> tuple[dict[str, Any], str | None]:
    """Return the state by name that an optimizer continues from.

    Parameters that are new start with their state in ``fresh``. The parameter groups are the stored
    ones if the options are the same, as some optimizers count in them; else the fresh ones.

    Args:
        stored: state of the checkpoint.
        fresh: state of the optimizer of today, before its first step.
        make: returns the optimizer of today.
        then: config of the checkpoint.
        now: config of today.

    Returns:
        the state; and a sentence if the stored state is of another kind of optimizer, else None.
    """
    old = then.get("optimizer") or {}
    new = now.get("optimizer") or {}
    old_kind, new_kind = old.get("_target_"), new.get("_target_")
    if None not in (old_kind, new_kind) and old_kind != new_kind:
        return dict(fresh), f"optimizer {old_kind} -> {new_kind}: it begins with an empty state"
    stored_keys = [set(values) for values in stored["state"].values()]
    missing = set(state_of_matrix(make) or ()).difference(*stored_keys) if stored_keys else set()
    if missing:
        return dict(fresh), (
            f"the optimizer of the checkpoint kept no {', '.join(sorted(missing))}: it begins with "
            f"an empty state"
        )
    same_options = bool(new) and old == new
    groups = []
    for old_group, new_group in zip(stored["param_groups"], fresh["param_groups"], strict=True):
        kept = old_group if same_options else {}
        groups.append(new_group | kept | {"params": new_group["params"]})
    names = {name for group in groups for name in group["params"]}
    states = fresh["state"] | stored["state"]
    return {"state": {k: v for k, v in states.items() if k in names}, "param_groups": groups}, None


def load_exactly(optimizer: Optimizer) -> Optimizer:
    """Make ``optimizer`` load its state exactly as it was saved, and return it.

    torch casts tensors to the type of the parameter, and takes a string apart.
    """
    given: dict[str, Any] = {}

    def remember(optimizer: Optimizer, state: dict[str, Any]) -> None:
        given.update(state)

    def restore(optimizer: Optimizer) -> None:
        numbers = chain.from_iterable(group["params"] for group in given["param_groups"])
        parameters = chain.from_iterable(group["params"] for group in optimizer.param_groups)
        for number, parameter in zip(numbers, parameters, strict=True):
            if number in given["state"]:
                loaded = optimizer.state[parameter]
                optimizer.state[parameter] = _as_saved(loaded, given["state"][number])
        given.clear()

    optimizer.register_load_state_dict_pre_hook(remember)
    optimizer.register_load_state_dict_post_hook(restore)
    return optimizer


def _as_saved(loaded: Any, saved: Any) -> Any:
    if isinstance(saved, Tensor):
        return loaded if loaded.dtype == saved.dtype else saved.to(loaded.device)
    if isinstance(saved, Mapping):
        return {key: _as_saved(loaded[key], value) for key, value in saved.items()}
    if isinstance(saved, list | tuple):
        return type(saved)([_as_saved(a, b) for a, b in zip(loaded, saved, strict=True)])
    return saved
