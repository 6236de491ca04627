"""Learning rates by step, and the optimizer's parameter groups."""

import math
from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn


class LearningRate(Protocol):
    """A factor on the optimizer's ``lr``: a function of the step alone, without state to save."""

    def __call__(self, step: int) -> float:
        """Return the factor at ``step``, counted from 0."""
        ...


class Constant:
    """Linear warm-up to 1 over ``warmup`` steps, then constant."""

    def __init__(self, *, warmup: int = 100) -> None:
        self.warmup = warmup

    def __call__(self, step: int) -> float:
        """Return the factor at ``step``."""
        return warm_up(step, self.warmup, 1.0)


class Linear:
    """Linear warm-up to 1 over ``warmup`` steps, then linear decay to ``end`` at ``max_steps``."""

    def __init__(self, *, max_steps: int, warmup: int = 100, end: float = 0.0) -> None:
        self.max_steps = max_steps
        self.warmup = warmup
        self.end = end

    def __call__(self, step: int) -> float:
        """Return the factor at ``step``."""
        rest = remaining(step, self.warmup, self.max_steps)
        return warm_up(step, self.warmup, self.end + (1 - self.end) * rest)


class Cosine:
    """Linear warm-up to 1 over ``warmup`` steps, then half a cosine to ``end`` at ``max_steps``.

    Source: Loshchilov & Hutter 2017, "SGDR", eq. 5, without restarts.
    """

    def __init__(self, *, max_steps: int, warmup: int = 100, end: float = 0.0) -> None:
        self.max_steps = max_steps
        self.warmup = warmup
        self.end = end

    def __call__(self, step: int) -> float:
        """Return the factor at ``step``."""
        rest = (1 - math.cos(math.pi * remaining(step, self.warmup, self.max_steps))) / 2
        return warm_up(step, self.warmup, self.end + (1 - self.end) * rest)


class InverseSquareRoot:
    """Linear warm-up to 1 over ``warmup`` steps, constant to ``flat``, then sqrt(flat / step).

    It has no end. Source: Karras et al. 2024, "Analyzing and Improving the Training Dynamics of
    Diffusion Models" (EDM2).
    """

    def __init__(self, *, warmup: int = 100, flat: int = 1000) -> None:
        if flat < 1:
            raise ValueError(f"flat={flat} must be at least one step")
        self.warmup = warmup
        self.flat = flat

    def __call__(self, step: int) -> float:
        """Return the factor at ``step``."""
        return warm_up(step, self.warmup, (self.flat / max(step, self.flat)) ** 0.5)


class WarmupStableDecay:
    """Linear warm-up to 1 over ``warmup`` steps, constant, then decay to ``end``.

    The decay takes the last share ``decay`` of the steps. It falls like 1 - sqrt(x), x from 0 to 1,
    the best cooldown of Hägele et al. 2024, "Scaling Laws and Compute-Optimal Training Beyond Fixed
    Training Durations". The three phases are MiniCPM's (Hu et al. 2024).
    """

    def __init__(
        self, *, max_steps: int, warmup: int = 100, decay: float = 0.2, end: float = 0.0
    ) -> None:
        if not 0 <= decay <= 1:
            raise ValueError(f"decay={decay} is a share of the steps: it must be between 0 and 1")
        self.max_steps = max_steps
        self.warmup = warmup
        self.decay = decay
        self.end = end

    def __call__(self, step: int) -> float:
        """Return the factor at ``step``."""
        decay_start = (1 - self.decay) * self.max_steps
        rest = 1 - (1 - remaining(step, decay_start, self.max_steps)) ** 0.5
        return warm_up(step, self.warmup, self.end + (1 - self.end) * rest)


KINDS = {
    kind.__name__: kind for kind in (Constant, Linear, Cosine, InverseSquareRoot, WarmupStableDecay)
}


def warm_up(step: int, warmup: int, rate: float) -> float:
    """Return ``rate``, limited by a line that reaches 1 with the last of ``warmup`` steps."""
    return min(1.0, (step + 1) / max(1, warmup), rate)


def remaining(step: int, start: float, end: float) -> float:
    """Return the share of the way from ``start`` to ``end`` that remains at ``step``."""
    return min(1.0, max(0.0, (end - step) / max(1, end - start)))


def rate_change(then: Mapping[str, Any], now: Mapping[str, Any], step: int) -> str | None:
    """Return a sentence on the learning rate at ``step`` under two configs.

    None if it is equal; or not known, because a config names no class of this module. No other code
    that a checkpoint names is run.
    """
    before = _rate(then, step)
    after = _rate(now, step)
    if before is None or after is None or before == after:
        return None
    return f"learning rate at this step: {before:.4g} -> {after:.4g}"


def _rate(config: Mapping[str, Any], step: int) -> float | None:
    options = dict(config.get("learning_rate") or {})
    module, _, name = str(options.pop("_target_", "")).rpartition(".")
    rate = (config.get("optimizer") or {}).get("lr")
    if module != __name__ or name not in KINDS or rate is None:
        return None
    try:
        return float(rate) * KINDS[name](**options)(step)
    except (TypeError, ValueError):
        return None


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Return two groups: matrices and kernels with weight decay, and the others without.

    The others are biases, gains and other parameters of one dimension.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1]},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
