"""The optimizer's parameter groups, its learning rate by step, and its state by parameter name."""

import math
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from exact_resume.checkpoint.store import assert_primitive


class LearningRate(Protocol):
    """A factor on the optimizer's ``lr``, a function of the step alone: there is no state to
    save.
    """

    def __call__(self, step: int) -> float: ...


class Constant:
    """Linear warm-up to 1 over ``warmup`` steps, then constant."""

    def __init__(self, *, warmup: int = 100) -> None:
        self.warmup = warmup

    def __call__(self, step: int) -> float:
        return warmed(step, self.warmup, 1.0)


class Linear:
    """Linear warm-up to 1 over ``warmup`` steps, then linear decay to ``end`` at ``max_steps``."""

    def __init__(self, *, max_steps: int, warmup: int = 100, end: float = 0.0) -> None:
        self.warmup, self.max_steps, self.end = warmup, max_steps, end

    def __call__(self, step: int) -> float:
        rest = left(step, self.warmup, self.max_steps)
        return warmed(step, self.warmup, self.end + (1 - self.end) * rest)


class Cosine:
    """Linear warm-up to 1 over ``warmup`` steps, then half a cosine down to ``end`` at
    ``max_steps``.

    Source: Loshchilov & Hutter 2017, "SGDR", eq. 5, without restarts.
    """

    def __init__(self, *, max_steps: int, warmup: int = 100, end: float = 0.0) -> None:
        self.warmup, self.max_steps, self.end = warmup, max_steps, end

    def __call__(self, step: int) -> float:
        rest = (1 - math.cos(math.pi * left(step, self.warmup, self.max_steps))) / 2
        return warmed(step, self.warmup, self.end + (1 - self.end) * rest)


class InverseSquareRoot:
    """Linear warm-up to 1 over ``warmup`` steps, constant up to ``flat``, then sqrt(flat / step):
    it has no end.

    Source: Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models"
        (EDM2).
    """

    def __init__(self, *, warmup: int = 100, flat: int = 1000) -> None:
        if flat < 1:
            raise ValueError(f"learning_rate.flat={flat} must be at least one step")
        self.warmup, self.flat = warmup, flat

    def __call__(self, step: int) -> float:
        return warmed(step, self.warmup, (self.flat / max(step, self.flat)) ** 0.5)


class WarmupStableDecay:
    """Linear warm-up to 1 over ``warmup`` steps, constant, then in the last share ``decay`` of
    steps down to ``end``.

    It falls like 1 - sqrt(x), x from 0 to 1, the best cooldown of Hägele et al. 2024, "Scaling Laws
    and Compute-Optimal Training Beyond Fixed Training Durations"; the three phases are MiniCPM's
    (Hu et al. 2024).
    """

    def __init__(
        self, *, max_steps: int, warmup: int = 100, decay: float = 0.2, end: float = 0.0
    ) -> None:
        if not 0 <= decay <= 1:
            raise ValueError(
                f"learning_rate.decay={decay} is a share of the steps: it must be a number from 0 "
                f"to 1"
            )
        self.warmup, self.max_steps, self.decay, self.end = warmup, max_steps, decay, end

    def __call__(self, step: int) -> float:
        rest = 1 - (1 - left(step, (1 - self.decay) * self.max_steps, self.max_steps)) ** 0.5
        return warmed(step, self.warmup, self.end + (1 - self.end) * rest)


def warmed(step: int, warmup: int, rate: float) -> float:
    """``rate``, or less in the first ``warmup`` steps, on a line that reaches 1 with the last of
    them.
    """
    return min(1.0, (step + 1) / max(1, warmup), rate)


def left(step: int, start: float, end: float) -> float:
    """How much of the way from ``start``, 1, to ``end``, 0, is left at ``step``."""
    return min(1.0, max(0.0, (end - step) / max(1, end - start)))


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Weight decay for matrices and kernels only, not for biases, gains and embeddings of one
    dimension.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1]},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def names_in_order(module: nn.Module, groups: Iterable[Mapping[str, Any]]) -> list[str]:
    """Names of the parameters in the order in which the optimizer numbers them."""
    name_of = {id(p): name for name, p in module.named_parameters()}
    return [name_of[id(p)] for group in groups for p in group["params"]]


def state_by_name(state: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """An optimizer's ``state_dict`` keyed by parameter name, the layout of
    torch.distributed.checkpoint.
    """
    return {
        "state": {names[i]: values for i, values in state["state"].items()},
        "param_groups": [
            g | {"params": [names[i] for i in g["params"]]} for g in state["param_groups"]
        ],
    }


def without(checkpoint: dict[str, Any], prefix: str) -> None:
    """Take the parameters and buffers of which the names begin so out of it, and their optimizer
    state by name.
    """
    weights = checkpoint.get("state_dict", {})  # a sharded model's are loaded elsewhere
    for name in [name for name in weights if name.startswith(prefix)]:
        del weights[name]
    for state in checkpoint.get("optimizer_states", ()):
        state["state"] = {k: v for k, v in state["state"].items() if not k.startswith(prefix)}
        for group in state["param_groups"]:
            group["params"] = [name for name in group["params"] if not name.startswith(prefix)]


def state_by_index(state: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """The inverse of ``state_by_name``.

    Raises:
        ValueError: if the state was saved for other parameters, naming some of them.
    """
    index = {name: i for i, name in enumerate(names)}
    stored = {name for g in state["param_groups"] for name in g["params"]}
    if stored != set(names):
        odd = sorted(stored ^ set(names))
        raise ValueError(
            f"the optimizer state is of another network; parameters that differ: "
            f"{', '.join(odd[:5])}"
        )
    return {
        "state": {index[name]: values for name, values in state["state"].items()},
        "param_groups": [
            g | {"params": [index[n] for n in g["params"]]} for g in state["param_groups"]
        ],
    }


def rate_change(then: Mapping[str, Any], now: Mapping[str, Any], step: int) -> str | None:
    """Return a sentence on the learning rate at ``step`` under two configs; None if it is equal, or
    not known.

    It is known where both configs name a class of this module; no other code that a checkpoint
    names is run.
    """
    rates = [_rate(config, step) for config in (then, now)]
    if None in rates or rates[0] == rates[1]:
        return None
    return f"learning rate at this step: {rates[0]:.4g} -> {rates[1]:.4g}"


def _rate(config: Mapping[str, Any], step: int) -> float | None:
    options = dict(config.get("learning_rate") or {})
    module, _, name = str(options.pop("_target_", "")).rpartition(".")
    kinds = {
        kind.__name__: kind
        for kind in (Constant, Linear, Cosine, InverseSquareRoot, WarmupStableDecay)
    }
    rate = (config.get("optimizer") or {}).get("lr")
    if module != __name__ or name not in kinds or rate is None:
        return None
    try:
        return float(rate) * kinds[name](**options)(step)
    except (TypeError, ValueError):
        return None


def kept_state(make: Callable[..., Optimizer]) -> dict[str, Any] | None:
    """Return what the optimizer keeps for a matrix after its first step; None if it cannot take one
    here.
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


def try_out(make: Callable[..., Optimizer], module: nn.Module) -> None:
    """Make the optimizer of ``module`` once, before any training, and look at what it keeps.

    Raises:
        ValueError: if its constructor refuses, or it keeps more than tensors and primitives, naming
            the key.
    """
    kind = getattr(make, "func", make)
    key = f"optimizer {kind.__module__}.{kind.__qualname__}"
    try:
        make(parameter_groups(module))
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:
        raise ValueError(f"{key}: {error}") from None
    try:
        assert_primitive(kept_state(make) or {}, "its state")
    except TypeError as error:
        raise ValueError(f"{key} could not be saved: {error}") from None


def continued(
    stored: Mapping[str, Any],
    fresh: Mapping[str, Any],
    make: Callable[..., Optimizer],
    then: Mapping[str, Any],
    now: Mapping[str, Any],
) -> tuple[dict[str, Any], str | None]:
    """Return the state by name that an optimizer goes on from, and a sentence if the stored one is
    not of its kind.

    Parameters that are new begin with what ``fresh`` has for them. Where the options are the same,
    the groups are the stored ones, as some optimizers count in them; where they were changed, they
    are the fresh ones.

    Args:
        stored: of a checkpoint, whose config is ``then``.
        fresh: of the optimizer that ``make`` gives under the config ``now``, before its first step.
    """
    old, new = then.get("optimizer") or {}, now.get("optimizer") or {}
    kinds = [options.get("_target_") for options in (old, new)]
    if None not in kinds and kinds[0] != kinds[1]:
        return dict(fresh), f"optimizer {kinds[0]} -> {kinds[1]}: it begins with an empty state"
    kept = [set(values) for values in stored["state"].values()]
    if kept and (missing := set(kept_state(make) or ()).difference(*kept)):
        lacks = ", ".join(sorted(missing))
        return dict(
            fresh
        ), f"the optimizer of the checkpoint kept no {lacks}: it begins with an empty state"
    states, same = fresh["state"] | stored["state"], bool(new) and old == new
    names = {name for group in fresh["param_groups"] for name in group["params"]}
    groups = [
        new_group | (old_group if same else {}) | {"params": new_group["params"]}
        for old_group, new_group in zip(stored["param_groups"], fresh["param_groups"], strict=True)
    ]
    return {"state": {k: v for k, v in states.items() if k in names}, "param_groups": groups}, None


def load_exactly(optimizer: Optimizer) -> Optimizer:
    """Let ``optimizer`` load its state as it was saved, and return it.

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
                optimizer.state[parameter] = _as_saved(
                    optimizer.state[parameter], given["state"][number]
                )
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
