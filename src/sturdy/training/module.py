"""The LightningModule: diffusion loss, one optimizer step a batch, averages of the weights.

    gradient = 1/V sum_v d/dw mean over shard v of [objective(denoiser, x_0, cond) + auxiliary],
    x_0 = space.encode(image)

A global batch is cut into V shards of constant shape, of which each process has a consecutive part.
The default generator is reseeded from (seed, step, shard) before each shard, and the gradients are
summed on a fixed tree, so that the bits depend on V and on nothing else.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from exact_resume.distributed import all_gather_object, rank, world_size
from exact_resume.randomness import Draws, key, reseed
from exact_resume.reduction import (
    GradientReducer,
    TreeSum,
    no_reduce,
    own_shards,
    tree_all_reduce,
)
from sturdy.diffusion.condition import Condition
from sturdy.diffusion.denoiser import Denoiser
from sturdy.diffusion.objective import Objective
from sturdy.diffusion.space import Pixels, Space
from sturdy.training.adapt_checkpoint import adapt_checkpoint
from sturdy.training.auxiliary import AuxiliaryLoss
from sturdy.training.ema import EMA
from sturdy.training.frozen import frozen_names
from sturdy.training.optim import LearningRate, parameter_groups
from sturdy.training.optimizer_state import load_exactly, names_in_order, state_by_name
from sturdy.training.strategies import (
    exact_norm,
    full,
    local,
    shard_parameters,
    with_gradient,
)

log = logging.getLogger(__name__)


class DiffusionModule(L.LightningModule):
    """Trains ``denoiser`` on ``objective``.

    Batches are tuples ``(image, label, positions)``: ``(b, c, h, w)`` in [-1, 1], ``(b,)`` int64,
    and the ``b`` global positions as integers on the CPU. A fourth value, ``(b, k)``, tells the
    network how the images were augmented.

    Args:
        space: turns the images of a batch into x_0; pixels by default.
        optimizer: called with parameter groups.
        ema: called with the denoiser.
        learning_rate: factor on the optimizer's rate by step.
        alignment: called with the backbone; an auxiliary loss, or None.
        clip: largest norm of the gradient; ``inf`` only measures it.
        seed: of the noise, times and dropout.
        shards: V in the equation of this file.
        config: the resolved config as primitives; every checkpoint has it, so that a checkpoint
            alone is enough to build the module.

    Attributes:
        reduce_gradients: sums the tensors of a step over processes.
        tree_in_backward: whether the backward pass of each shard sums the gradients over processes
            on the tree; the shards are then dealt to the processes in turn (``fsdp2``).
        initial: ``path`` and ``sha256`` of the checkpoint whose weights the run started from; None
            if it started from none.
        base_names: tensors of the denoiser that a base puts back (see ``frozen``).
    """

    def __init__(
        self,
        denoiser: Denoiser,
        objective: Objective,
        *,
        space: Space | None = None,
        optimizer: Callable[..., Optimizer] = torch.optim.AdamW,
        ema: Callable[[nn.Module], EMA] = EMA,
        learning_rate: LearningRate = lambda step: 1.0,
        alignment: Callable[[nn.Module], AuxiliaryLoss] | None = None,
        clip: float = 1.0,
        seed: int = 0,
        shards: int = 1,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False  # Lightning's accumulation is no tree
        self.denoiser = denoiser
        self.base_names = frozen_names(denoiser)
        self.ema = ema(denoiser)
        self.alignment = alignment(denoiser.backbone) if alignment else None
        self.objective = objective
        self.space = space or Pixels()
        if isinstance(self.space, nn.Module):
            raise ValueError(
                f"space: {type(self.space).__name__} is an nn.Module, so that its weights would "
                f"enter the checkpoints; hold the network in a plain attribute of a Space"
            )
        self.make_optimizer = optimizer
        self.learning_rate = learning_rate
        self.clip = clip
        self.seed = seed
        self.shards = shards
        self.config = config
        self.reduce_gradients: GradientReducer = no_reduce
        self.tree_in_backward = False
        self.initial: dict[str, Any] | None = None

    @override
    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Take one optimizer step; return the scalars to log.

        gradient = 1/V sum over shards of ``shard_gradients``
        """
        tree = TreeSum()
        for shard, part in self.shards_of(batch):
            gradients, scalars = self.shard_gradients(shard, part)
            values = [torch.stack(list(scalars.values()))]
            if self.tree_in_backward:
                values = tree_all_reduce(values)
            tree.push([*gradients, *values])
        total = self.reduce_gradients(tree.sum())
        torch._foreach_div_(total, self.shards)
        *gradients, means = total
        norm = self._optimizer_step(gradients)
        return dict(zip(scalars, means, strict=True)) | {"grad_norm": norm}

    def shards_of(self, batch: Any) -> Iterator[tuple[int, tuple[Any, ...]]]:
        """Yield number and batch of each shard of this process."""
        numbers = own_shards(self.shards, rank(), world_size(), interleaved=self.tree_in_backward)
        b = len(batch[0]) // len(numbers)
        for i, shard in enumerate(numbers):
            rows = slice(i * b, (i + 1) * b)
            yield shard, tuple(values[rows] for values in batch)

    def shard_gradients(
        self, shard: int, batch: tuple[Any, ...]
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Return the gradients of one shard's mean loss, and the scalars to log.

        Args:
            shard: its number in the global batch.
            batch: its part of the global batch.

        Returns:
            a gradient for each of ``trained()``, detached from ``.grad``; and means by name.
        """
        reseed(self.seed, "shard", self.global_step, shard)
        image, _, positions, *_ = batch
        draws = Draws(self.seed, positions)
        x0 = self.space.encode(image, draws)
        observed = self.alignment.observe(self.denoiser.backbone) if self.alignment else None
        with observed or nullcontext([]) as features:
            loss = self.objective(self.denoiser, x0, self.condition_of(batch), draws)
        scalars = {"loss": loss.detach().mean()}
        if self.alignment:
            term, more = self.alignment(features, image)
            loss = loss + term
            scalars |= more
        self.manual_backward(loss.mean())
        parameters = self.trained()
        gradients = [local(torch.zeros_like(p) if p.grad is None else p.grad) for p in parameters]
        for p in parameters:
            p.grad = None
        return gradients, scalars

    def condition_of(self, batch: tuple[Any, ...]) -> Condition:
        """Return the condition of a batch, from its label and its augmentation, if any.

        A text condition needs no other batch: ``label`` is then the number of a caption (see
        ``Denoiser.make_condition``). Override this method for a batch that has the text itself.
        """
        image, label, _, *augmentation = batch
        condition = self.denoiser.condition(image, label, *augmentation)
        size = self.space.image_size(image)
        return condition.sized(*size) if size else condition

    @override
    def on_validation_epoch_start(self) -> None:
        # loss of each image, by the first position of its batch
        self.held_out: dict[int, Tensor] = {}

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Compute the loss of the averaged weights.

        Each held-out image always has the same noise and time, so that steps can be compared.
        """
        image, _, positions, *_ = batch
        draws = Draws(key(self.seed, "validation"), positions)
        x0 = self.space.encode(image, draws)
        denoiser = cast(Denoiser, self.ema.model)
        loss = self.objective(denoiser, x0, self.condition_of(batch), draws)
        self.held_out[int(positions[0])] = loss

    @override
    def on_validation_epoch_end(self) -> None:
        """Log the mean over all held-out images in their order, whichever process computed them."""
        mine = {first: loss.float().cpu() for first, loss in self.held_out.items()}
        computed: dict[int, Tensor] = {}
        for part in all_gather_object(mine):
            computed |= part
        losses = torch.cat([computed[first] for first in sorted(computed)])
        self.log("val/loss", losses.mean(), logger=False)

    @override
    def configure_model(self) -> None:
        """Shard the parameters over processes, under a strategy that does so."""
        for network in (self.denoiser, *self.ema.networks()):
            shard_parameters(self, cast(Denoiser, network).backbone, tree=self.tree_in_backward)
        if self.alignment:
            shard_parameters(self, self.alignment.head, tree=self.tree_in_backward)

    @override
    def configure_optimizers(self) -> Optimizer:
        return load_exactly(self.make_optimizer(parameter_groups(self)))

    def trained(self) -> list[nn.Parameter]:
        """Return the parameters in the order in which their gradients are summed.

        Those that a base puts back are not among them.
        """
        parameters = self.denoiser.named_parameters()
        network = [p for name, p in parameters if name not in self.base_names]
        auxiliary = self.alignment.head.parameters() if self.alignment else []
        return [*network, *auxiliary]

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the optimizer's state by parameter name, and the config, into the checkpoint.

        Raises:
            FloatingPointError: the weights have diverged; earlier checkpoints are worth more.
        """
        if not all(local(p).isfinite().all() for p in self.trained()):
            raise FloatingPointError(
                f"the weights are not finite at step {self.global_step}, and are not saved. See "
                f"train/grad_norm in metrics.csv; lower optimizer.lr or clip, and continue with "
                f"ckpt_path=last"
            )
        optimizer = self.optimizers(use_pl_optimizer=False)
        names = names_in_order(self, optimizer.param_groups)  # type: ignore[union-attr]
        states = checkpoint["optimizer_states"]
        checkpoint["optimizer_states"] = [state_by_name(state, names) for state in states]
        checkpoint["config"] = self.config
        if self.initial:
            checkpoint["init_from"] = self.initial

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Fit the checkpoint to this module, which may have changed on purpose, and log how.

        Raises:
            CheckpointLoadError: the weights are of another network; the message names them.
        """
        self.initial = checkpoint.get("init_from")
        changes = adapt_checkpoint(checkpoint, self)
        if rank() == 0:
            for line in changes:
                log.info(line)

    def _optimizer_step(self, gradients: list[Tensor]) -> Tensor:
        """Clip, step and average; return the norm of the gradient before clipping, ``()``."""
        step = self.global_step
        optimizer = cast(Any, self.optimizers())
        parameters = self.trained()
        pairs = zip(parameters, gradients, strict=True)
        of_parameters = [with_gradient(p, gradient) for p, gradient in pairs]
        for p, gradient in zip(parameters, of_parameters, strict=True):
            p.grad = gradient
        norm_of = exact_norm if self.tree_in_backward else nn.utils.get_total_norm
        norm = norm_of(of_parameters)
        nn.utils.clip_grads_with_norm_(parameters, self.clip, norm)
        for group in optimizer.param_groups:
            group["lr"] = optimizer.optimizer.defaults["lr"] * self.learning_rate(step)
        optimizer.step()
        optimizer.zero_grad()
        self.ema.update(self.denoiser, step)
        return full(norm)
