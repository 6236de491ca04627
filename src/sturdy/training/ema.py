"""Exponential moving averages of the weights; validation and sampling use one of them.

    ema <- beta(step) ema + (1 - beta(step)) weights

They are frozen submodules of the LightningModule, so they are saved, loaded and moved to devices
like the weights. Beta is a function of the step alone, so there is no other state. What no step
changes, because a base puts it back, is shared with the network and not averaged.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from sturdy.training import ema_profiles
from sturdy.training.frozen import copy_trained


class EMA(nn.Module):
    """Plain decay with a warm-up that forgets the initialisation.

    beta(step) = min(decay, (1 + step) / (10 + step)), as in TensorFlow's ExponentialMovingAverage.

    Args:
        model: the network to average.
        decay: limit of beta for large steps.

    Attributes:
        model: the average to use, always in eval mode and without gradients.
        extra_averages: other averages of the same network, for subclasses.
    """

    def __init__(self, model: nn.Module, *, decay: float = 0.999) -> None:
        super().__init__()
        self.model = frozen_copy(model)
        self.extra_averages = nn.ModuleList()
        self.decay = decay

    def networks(self) -> list[nn.Module]:
        """Return all averages, beginning with ``model``."""
        return [self.model, *self.extra_averages]

    def betas(self, step: int) -> list[float]:
        """Return beta for each of ``networks()``."""
        return [min(self.decay, (1 + step) / (10 + step))]

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move the averages towards ``model``; ``step`` counts the updates before this one."""
        for average, beta in zip(self.networks(), self.betas(step), strict=True):
            pairs = zip(average.parameters(), model.parameters(), strict=True)
            moving = [(ours, theirs) for ours, theirs in pairs if ours is not theirs]
            averages: list[Tensor] = [pair[0] for pair in moving]
            weights: list[Tensor] = [pair[1] for pair in moving]
            torch._foreach_lerp_(averages, weights, 1 - beta)
            for buffer, current in zip(average.buffers(), model.buffers(), strict=True):
                buffer.copy_(current)

    @override
    def train(self, mode: bool = True) -> "EMA":
        """Stay in eval mode, whatever the mode of the parent."""
        return super().train(False)


class PowerEMA(EMA):
    """Averages whose length grows with the training, of several relative lengths at once.

    beta(step) = (1 - 1 / (step + 1))^(gamma + 1), so that the weights of step tau count as
    tau^gamma, and the first update forgets the initialisation. Averages of other lengths can be
    computed afterwards from stored snapshots of two (see ``ema_profiles``). Source: Karras et al.
    2024, "Analyzing and Improving the Training Dynamics of Diffusion Models" (EDM2), section 3.1
    and appendix C.

    Args:
        model: the network to average.
        stds: the lengths, as standard deviations of their profiles in units of the training so far;
            each takes a copy of the network.
        std: the length of ``self.model``.

    Raises:
        ValueError: ``std`` is none of ``stds``, or one of them is no possible length.
    """

    def __init__(
        self, model: nn.Module, *, stds: Sequence[float] = (0.05, 0.10), std: float = 0.10
    ) -> None:
        if std not in stds or len(set(stds)) < len(stds):
            raise ValueError(f"stds={list(stds)} must differ, and contain std={std}")
        super().__init__(model)
        self.stds = [std, *(s for s in stds if s != std)]
        self.gammas = [ema_profiles.gamma(s) for s in self.stds]
        self.extra_averages.extend(frozen_copy(model) for _ in self.stds[1:])

    @override
    def betas(self, step: int) -> list[float]:
        return [ema_profiles.beta(g, step + 1) for g in self.gammas]


def frozen_copy(model: nn.Module) -> nn.Module:
    """Return a copy in eval mode and without gradients.

    What a base puts back is not copied, but shared (see ``frozen``).
    """
    return copy_trained(model).requires_grad_(False).eval()
