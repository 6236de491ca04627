"""Exponential moving averages of the weights; one of them is what validation and sampling use.

    ema <- beta(step) ema + (1 - beta(step)) weights

They are frozen submodules of the LightningModule, so they are saved, loaded and placed like the
weights; and beta is a function of the step alone, so there is nothing else to save.
"""

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import nn

from sturdy.training import ema_profiles


class EMA(nn.Module):
    """Plain decay with a warm-up that forgets the initialisation: beta(step) = min(decay, (1 +
    step) / (10 + step)).

    Source of the warm-up: TensorFlow's ExponentialMovingAverage.

    Args:
        model: what is averaged; its average is ``self.model``, always in eval mode and without
            gradients.
        decay: limit of beta for large steps.
    """

    def __init__(self, model: nn.Module, *, decay: float = 0.999) -> None:
        super().__init__()
        self.model = frozen(model)
        self.others = nn.ModuleList()
        self.decay = decay

    def networks(self) -> list[nn.Module]:
        """All averages, the one to use first."""
        return [self.model, *self.others]

    def betas(self, step: int) -> list[float]:
        """beta of each of ``networks()``."""
        return [min(self.decay, (1 + step) / (10 + step))]

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move the averages towards ``model``; ``step`` counts the updates before this one."""
        for average, beta in zip(self.networks(), self.betas(step), strict=True):
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - beta)
            for mine, current in zip(average.buffers(), model.buffers(), strict=True):
                mine.copy_(current)

    def train(self, mode: bool = True) -> "EMA":
        """Stay in eval mode whatever the parent does."""
        return super().train(False)


class PowerEMA(EMA):
    """Averages that grow with the training, of several lengths at once: beta(step) = (1 - 1 / (step
    + 1))^(gamma + 1).

    The weights of step tau count as tau^gamma, so the first update forgets the initialisation. From
    stored snapshots of two lengths all others can be put together afterwards (see ``profiles``).
    Source: Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models"
        (EDM2), section 3.1 and appendix C.

    Args:
        stds: the lengths, as standard deviations of their profiles in units of the training so far;
            each costs a copy of the network.
        std: the one that is ``self.model``.

    Raises:
        ValueError: ``std`` is none of ``stds``, or one of them is no length.
    """

    def __init__(
        self, model: nn.Module, *, stds: Sequence[float] = (0.05, 0.10), std: float = 0.10
    ) -> None:
        if std not in stds or len(set(stds)) < len(stds):
            raise ValueError(f"ema.stds={list(stds)} must differ, and one of them be ema.std={std}")
        super().__init__(model)
        self.stds = [std, *(s for s in stds if s != std)]
        self.gammas = [ema_profiles.gamma(s) for s in self.stds]
        self.others.extend(frozen(model) for _ in self.stds[1:])

    def betas(self, step: int) -> list[float]:
        return [ema_profiles.beta(g, step + 1) for g in self.gammas]


def frozen(model: nn.Module) -> nn.Module:
    """A copy in eval mode and without gradients."""
    return deepcopy(model).requires_grad_(False).eval()
