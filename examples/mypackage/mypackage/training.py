"""An optimizer, and an average of the weights."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from sturdy.training.ema import EMA


class Lion(Optimizer):
    """w <- w - lr (sign(beta_1 m + (1 - beta_1) g) + weight_decay w) (Chen et al. 2023).

    m is the momentum, beta_2 m + (1 - beta_2) g.

    Args:
        params: parameters or groups of them, as of every optimizer.
        lr: the learning rate.
        betas: beta_1 and beta_2.
        weight_decay: of all weights, decoupled from the gradient.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; return the loss of ``closure``."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            first, second = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                momentum = state["momentum"]
                direction = momentum.lerp(p.grad, 1 - first).sign_()
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])
                momentum.lerp_(p.grad, 1 - second)
        return loss


class Uniform(EMA):
    """The plain mean of the weights of all steps from ``start`` on; before, the weights.

    Args:
        model: the network to average.
        start: the first step that counts.
    """

    def __init__(self, model: nn.Module, *, start: int = 0) -> None:
        super().__init__(model)
        self.start = start

    @override
    def betas(self, step: int) -> list[float]:
        """Return the share of the average that update number ``step``, from 0 on, keeps."""
        averaged = max(0, step - self.start)
        return [averaged / (averaged + 1)]
