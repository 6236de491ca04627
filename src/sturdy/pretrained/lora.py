"""LoRA: small trained matrices beside the frozen layers of a base.

    y = W x + alpha / rank B A x,    A (rank, in) random and B (out, rank) zero at first

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1. The
layers are peft's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # the projections of diffusers' attention layers
MARK = ".lora_"  # in the name of every tensor of an adapter, and of no other
MAX_NAMES = 6  # of layers in an error message


@dataclass(frozen=True)
class LoRA:
    """An adapter that is not built yet.

    Args:
        rank: of the matrices.
        alpha: strength of the adapter; None for ``rank``, so that the factor is 1.
        targets: the layers that get an adapter, by the end of their names.
        dropout: of the inputs of A, in training.

    Raises:
        ValueError: an argument is out of its range.
    """

    rank: int
    alpha: float | None = None
    targets: Sequence[str] | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise ValueError(f"lora.rank={self.rank} must be a whole number of at least 1")
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"lora.alpha={self.alpha} must be above 0, or null for lora.rank")
        if isinstance(self.targets, str) or (self.targets is not None and not self.targets):
            raise ValueError(
                f"lora.targets={self.targets!r} must be a list such as [{','.join(ATTENTION)}]"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout={self.dropout} must be at least 0 and less than 1")

    def add_to(self, network: nn.Module) -> None:
        """Add the adapter to ``network``, and freeze everything else.

        The adapter has the dtype of its layers. Its weights are drawn from PyTorch's default
        generator.

        Raises:
            ValueError: a target is the name of no layer; the message names some layers.
        """
        from peft import LoraConfig, inject_adapter_in_model

        targets = list(self.targets or ATTENTION)
        layers = [n for n, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        for target in targets:
            if not any(name == target or name.endswith(f".{target}") for name in layers):
                examples = ", ".join(layers[:: max(1, len(layers) // MAX_NAMES)][:MAX_NAMES])
                raise ValueError(
                    f"lora.targets: no linear or convolutional layer of {type(network).__name__} "
                    f"is called {target}; its layers are called like {examples}"
                )
        alpha = self.rank if self.alpha is None else self.alpha
        config = LoraConfig(
            r=self.rank,
            lora_alpha=alpha,  # type: ignore[arg-type]
            target_modules=targets,
            lora_dropout=self.dropout,
        )
        inject_adapter_in_model(config, network)


def original_name(name: str) -> str:
    """Return the name that a tensor of the base had before adapters were added."""
    return name.replace(".base_layer.", ".")
