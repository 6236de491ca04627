"""An exponential moving average of the weights, which is what validation and sampling use.

    ema <- beta(step) ema + (1 - beta(step)) weights,    beta(step) = min(decay, (1 + step) / (10 + step))

The warm-up of beta (as in Polyak & Juditsky averaging practice, TensorFlow's ExponentialMovingAverage) forgets the
initialisation. It is a frozen submodule of the LightningModule, so it is saved, loaded and placed like the weights.
"""

from copy import deepcopy

import torch
from torch import nn


class EMA(nn.Module):
    """Holds the averaged copy of ``model`` as ``self.model``, always in eval mode and without gradients.

    Args:
        decay: limit of beta for large steps.
    """

    def __init__(self, model: nn.Module, *, decay: float = 0.999) -> None:
        super().__init__()
        self.model = deepcopy(model).requires_grad_(False).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move the average towards ``model``; ``step`` counts the updates before this one."""
        beta = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - beta)
        for average, current in zip(self.model.buffers(), model.buffers(), strict=True):
            average.copy_(current)

    def train(self, mode: bool = True) -> "EMA":
        """Stay in eval mode whatever the parent does."""
        return super().train(False)
