"""The optimizer's parameter groups, its learning rate by step, and its state by parameter name."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from torch import nn


class LearningRate(Protocol):
    """A factor on the optimizer's ``lr``, a function of the step alone: there is no state to save."""

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
    """Linear warm-up to 1 over ``warmup`` steps, then half a cosine down to ``end`` at ``max_steps``.

    Source: Loshchilov & Hutter 2017, "SGDR", eq. 5, without restarts.
    """

    def __init__(self, *, max_steps: int, warmup: int = 100, end: float = 0.0) -> None:
        self.warmup, self.max_steps, self.end = warmup, max_steps, end

    def __call__(self, step: int) -> float:
        rest = (1 - math.cos(math.pi * left(step, self.warmup, self.max_steps))) / 2
        return warmed(step, self.warmup, self.end + (1 - self.end) * rest)


class InverseSquareRoot:
    """Linear warm-up to 1 over ``warmup`` steps, constant up to ``flat``, then sqrt(flat / step): it has no end.

    Source: Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models" (EDM2).
    """

    def __init__(self, *, warmup: int = 100, flat: int = 1000) -> None:
        if flat < 1:
            raise ValueError(f"learning_rate.flat={flat} must be at least one step")
        self.warmup, self.flat = warmup, flat

    def __call__(self, step: int) -> float:
        return warmed(step, self.warmup, (self.flat / max(step, self.flat)) ** 0.5)


class WarmupStableDecay:
    """Linear warm-up to 1 over ``warmup`` steps, constant, then in the last share ``decay`` of steps down to ``end``.

    It falls like 1 - sqrt(x), x from 0 to 1, the best cooldown of Hägele et al. 2024, "Scaling Laws and Compute-Optimal
    Training Beyond Fixed Training Durations"; the three phases are MiniCPM's (Hu et al. 2024).
    """

    def __init__(self, *, max_steps: int, warmup: int = 100, decay: float = 0.2, end: float = 0.0) -> None:
        if not 0 <= decay <= 1:
            raise ValueError(f"learning_rate.decay={decay} is a share of the steps: it must be a number from 0 to 1")
        self.warmup, self.max_steps, self.decay, self.end = warmup, max_steps, decay, end

    def __call__(self, step: int) -> float:
        rest = 1 - (1 - left(step, (1 - self.decay) * self.max_steps, self.max_steps)) ** 0.5
        return warmed(step, self.warmup, self.end + (1 - self.end) * rest)


def warmed(step: int, warmup: int, rate: float) -> float:
    """``rate``, or less in the first ``warmup`` steps, on a line that reaches 1 with the last of them."""
    return min(1.0, (step + 1) / max(1, warmup), rate)


def left(step: int, start: float, end: float) -> float:
    """How much of the way from ``start``, 1, to ``end``, 0, is left at ``step``."""
    return min(1.0, max(0.0, (end - step) / max(1, end - start)))


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Weight decay for matrices and kernels only, not for biases, gains and embeddings of one dimension."""
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
    """An optimizer's ``state_dict`` keyed by parameter name, the layout of torch.distributed.checkpoint."""
    return {
        "state": {names[i]: values for i, values in state["state"].items()},
        "param_groups": [g | {"params": [names[i] for i in g["params"]]} for g in state["param_groups"]],
    }


def without(checkpoint: dict[str, Any], prefix: str) -> None:
    """Take the parameters and buffers of which the names begin so out of it, and their optimizer state by name."""
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
        raise ValueError(f"the optimizer state is of another network; parameters that differ: {', '.join(odd[:5])}")
    return {
        "state": {index[name]: values for name, values in state["state"].items()},
        "param_groups": [g | {"params": [index[n] for n in g["params"]]} for g in state["param_groups"]],
    }
