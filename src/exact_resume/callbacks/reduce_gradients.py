"""Average the gradients of a stock module over processes, in an order that a resume repeats."""

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from exact_resume.distributed import peer_errors, world_size
from exact_resume.reduction import AllReduce


class ReduceGradients(Callback):
    """Averages gradients before each optimizer step, before they are clipped.

    All processes begin with the weights of process 0. After each step they take its buffers, such
    as the statistics of batch normalization, because a checkpoint has those of process 0.
    """

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the weights of process 0.

        Raises:
            ValueError: in half precision (float16) each process would skip steps of its own.
        """
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise ValueError(
                "precision=16-mixed works in one process only; use bf16-mixed with several"
            )
        copy_from_rank_zero([*pl_module.parameters(), *pl_module.buffers()])

    @override
    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        average_gradients([p for group in optimizer.param_groups for p in group["params"]])

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: object
    ) -> None:
        copy_from_rank_zero(list(pl_module.buffers()))


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Replace each gradient by its mean over all processes.

    A gradient that only some processes have counts as zero in the others. One that none has stays
    None, so that the optimizer leaves its parameter alone.
    """
    has = torch.tensor([float(p.grad is not None) for p in parameters])
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    counts = has.to(parameters[0].device)
    AllReduce(parameters, overlap=False)([*gradients, counts])
    torch._foreach_div_(gradients, world_size())
    for p, gradient, count in zip(parameters, gradients, counts.tolist(), strict=True):
        p.grad = gradient if count else None


def copy_from_rank_zero(tensors: list[Tensor]) -> None:
    """Overwrite ``tensors`` with those of process 0."""
    with torch.no_grad(), peer_errors():
        for tensor in tensors:
            dist.broadcast(tensor, 0)
