"""What every backbone shares: the condition ``c(t, label)``, zero initialisation and recomputation.

c(t, label) = MLP(fourier(1000 t)) + embedding[label],        embedding[num_classes] is "no label"
"""

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Module = TypeVar("Module", bound=nn.Module)


def fourier(t: Tensor, size: int, *, max_period: float = 10_000.0) -> Tensor:
    """Return cosines, then sines, of ``1000 t`` at frequencies from 1 down to ``1 / max_period``.

    Source: Vaswani et al. 2017, section 3.5, with the time of DDPM's 1,000 steps (Ho et al. 2020).

    Args:
        t: times in [0, 1], ``(b,)``; computed in float32 at least, for bfloat16 cannot tell 998
            from 1000.
        size: number of features, even.
        max_period: of the slowest feature, in steps.

    Returns:
        ``(b, size)`` in [-1, 1].
    """
    t = t.to(torch.promote_types(t.dtype, torch.float32))
    exponent = torch.arange(size // 2, dtype=t.dtype, device=t.device) / (size // 2)
    angle = 1000 * t[:, None] * torch.exp(-math.log(max_period) * exponent)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class ConditionEmbedding(nn.Module):
    """Time, label and augmentation as one vector ``(b, size)``, which modulates the blocks.

    Args:
        size: length of the vector.
        features: number of Fourier features of the time, even.
        num_classes: number of labels; 0 ignores labels. Row ``num_classes`` is the null label's.
        conditions: length of the augmentation; 0 for none.

    Raises:
        ValueError: ``features`` is odd.
    """

    def __init__(
        self, size: int, *, features: int, num_classes: int = 0, conditions: int = 0
    ) -> None:
        super().__init__()
        if features % 2:
            raise ValueError(f"features={features} must be even")
        self.features = features
        self.num_classes = num_classes
        self.hidden = nn.Linear(features, size)
        self.time = nn.Linear(size, size)
        self.label = nn.Embedding(num_classes + 1, size) if num_classes else None
        self.more = zero_init(nn.Linear(conditions, size, bias=False)) if conditions else None

    def forward(
        self, t: Tensor, label: Tensor | None = None, augmentation: Tensor | None = None
    ) -> Tensor:
        """Return the vector ``(b, size)``.

        Args:
            t: ``(b,)`` in [0, 1].
            label: ``(b,)`` int64 in [0, num_classes]; None is the null label.
            augmentation: ``(b, conditions)``; None is zeros.

        Raises:
            IndexError: a label is out of range (on a GPU: a device-side assertion).
        """
        features = fourier(t, self.features).to(self.hidden.weight.dtype)
        c = self.time(F.silu(self.hidden(features)))
        if self.label is not None:
            if label is None:
                label = torch.full(t.shape, self.num_classes, dtype=torch.int64, device=t.device)
            try:
                c = c + self.label(label)
            except IndexError as error:
                raise IndexError(
                    f"a label is not in [0, {self.num_classes}]: num_classes={self.num_classes} "
                    f"must be the number of classes of the data"
                ) from error
        if self.more is not None and augmentation is not None:
            c = c + self.more(augmentation)
        return F.silu(c)


def zero_init(module: Module) -> Module:
    """Set all parameters to zero, and return the module.

    A branch that ends in zeros starts as "add nothing" (Goyal et al. 2017, 5.1).
    """
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def block_at(blocks: Sequence[nn.Module] | nn.ModuleList, depth: int) -> nn.Module:
    """Return block ``depth``, counted from 1; raise ValueError if there is none."""
    if not 1 <= depth <= len(blocks):
        raise ValueError(f"depth={depth} is none of the blocks 1 to {len(blocks)}")
    return blocks[depth - 1]


def checkpointed_call(block: nn.Module, *args: Tensor, recompute: bool) -> Tensor:
    """Return ``block(*args)``.

    With ``recompute``, backward runs it again, with the same dropout, instead of keeping its
    activations.
    """
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=True)
    return block(*args)
