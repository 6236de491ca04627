"""The LightningModule: diffusion loss, one optimizer step a batch, EMA.

    gradient = 1/V sum over shards v of d/dw mean over the shard of objective(denoiser, x_0) [-
    weight alignment]

A global batch is cut into V shards of constant shape, of which each process has a consecutive part.
Each is computed after the default generator was reseeded from (seed, step, shard), and their
gradients are summed on a fixed tree; so the bits depend on V and on nothing else.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from exact_resume.checkpoint.store import FORMAT, CheckpointLoadError
from exact_resume.distributed import all_gather_object, rank, world_size
from exact_resume.randomness import Draws, key, reseed
from exact_resume.reduction import GradientReducer, TreeSum, no_reduce
from sturdy.diffusion.denoiser import Denoiser
from sturdy.diffusion.objective import Objective
from sturdy.diffusion.space import Pixels, Space
from sturdy.training.ema import EMA
from sturdy.training.match_weights import (
    Match,
    backbone_changes,
    class_change,
    match,
    moved_rows,
    shorten,
    state_by_rows,
)
from sturdy.training.optim import (
    LearningRate,
    continued,
    load_exactly,
    names_in_order,
    parameter_groups,
    rate_change,
    state_by_index,
    state_by_name,
    without,
)
from sturdy.training.strategies import full, local, shard_parameters, with_gradient

if TYPE_CHECKING:  # imported by those that are aligned
    from sturdy.training.alignment import Alignment

log = logging.getLogger(__name__)


class DiffusionModule(L.LightningModule):
    """Trains ``denoiser`` on ``objective``.

    Batches are tuples ``(image, label, positions)``: ``(b, c, h, w)`` in [-1, 1], ``(b,)`` int64,
    and the ``b`` global positions as integers on the CPU; a fourth, ``(b, k)``, tells the network
    how the images were augmented.

    Args:
        space: turns the images of a batch into x_0; pixels by default.
        optimizer: called with parameter groups.
        ema: called with the denoiser.
        learning_rate: factor on the optimizer's rate by step.
        alignment: called with the backbone; None for none.
        clip: largest norm of the gradient; ``inf`` only measures it.
        seed, shards: see the module's equation.
        config: the resolved config as primitives; kept in every checkpoint so that it rebuilds
            alone.

    Attributes:
        initial: ``path`` and ``sha256`` of the checkpoint that the run began from; None if it began
            from none.
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
        alignment: "Callable[[nn.Module], Alignment] | None" = None,
        clip: float = 1.0,
        seed: int = 0,
        shards: int = 1,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = (
            False  # Lightning's accumulation is a left fold; ours is a tree
        )
        self.space = space or Pixels()
        self.denoiser = denoiser
        self.ema = ema(denoiser)
        self.alignment = alignment(denoiser.backbone) if alignment else None
        self.objective, self.make_optimizer, self.learning_rate = (
            objective,
            optimizer,
            learning_rate,
        )
        self.clip, self.seed, self.shards, self.config = clip, seed, shards, config
        self.sum: GradientReducer = no_reduce  # over processes
        self.initial: dict[str, Any] | None = None

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        tree = TreeSum()
        for shard, *samples in self.shards_of(batch):
            gradients, terms = self.gradients(shard, *samples)
            tree.push([*gradients, torch.stack(list(terms.values()))])
        *gradients, means = total = self.sum(tree.sum())
        torch._foreach_div_(total, self.shards)
        return dict(zip(terms, means, strict=True)) | {"grad_norm": self._optimizer_step(gradients)}

    def on_validation_epoch_start(self) -> None:
        self.held_out: dict[
            int, Tensor
        ] = {}  # loss of each image, by the first position of its batch

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """The EMA's loss, each held-out image always with the same noise and time, so that steps
        compare.
        """
        image, label, positions, *_ = batch
        draws = Draws(key(self.seed, "validation"), positions)
        x0 = self.space.encode(image, draws)
        self.held_out[int(positions[0])] = self.objective(
            cast(Denoiser, self.ema.model), x0, label, draws
        )

    def on_validation_epoch_end(self) -> None:
        """The mean over all held-out images in their order, whichever process computed which."""
        computed: dict[int, Tensor] = {}
        for part in all_gather_object(
            {first: loss.float().cpu() for first, loss in self.held_out.items()}
        ):
            computed |= part
        self.log(
            "val/loss",
            torch.cat([computed[first] for first in sorted(computed)]).mean(),
            logger=False,
        )

    def configure_model(self) -> None:
        """Lightning's place to cut parameters into parts; the averages like what they average."""
        for network in (self.denoiser, *self.ema.networks()):
            shard_parameters(self, cast(Denoiser, network).backbone)
        if self.alignment:
            shard_parameters(self, self.alignment.project)

    def configure_optimizers(self) -> Optimizer:
        return load_exactly(self.make_optimizer(parameter_groups(self)))

    def trained(self) -> list[nn.Parameter]:
        """In the order in which their gradients are summed."""
        return [
            *self.denoiser.parameters(),
            *(self.alignment.project.parameters() if self.alignment else ()),
        ]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Optimizer state by parameter name, and the config that rebuilds this module.

        Raises:
            FloatingPointError: if the weights have diverged; the checkpoints before they did are
                worth more.
        """
        if not all(local(p).isfinite().all() for p in self.trained()):
            raise FloatingPointError(
                f"the weights are not finite at step {self.global_step}, and are not saved. See "
                f"train/grad_norm in "
                f"metrics.csv; lower optimizer.lr or clip, and continue with ckpt_path=last"
            )
        optimizer = self.optimizers(use_pl_optimizer=False)
        names = names_in_order(self, optimizer.param_groups)  # type: ignore[union-attr]
        checkpoint["optimizer_states"] = [
            state_by_name(s, names) for s in checkpoint["optimizer_states"]
        ]
        checkpoint |= {"config": self.config, "format": FORMAT}
        if self.initial:
            checkpoint["init_from"] = self.initial

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Fit the checkpoint to this module, which the user may have changed on purpose, and say
        what that means.

        Label tables and their optimizer state follow the names of the classes. Another optimizer
        begins with an empty state. What was aligned and no longer is leaves its projection and its
        encoder behind.

        Raises:
            CheckpointLoadError: if its weights are not those of this network, naming the first that
                differ.
        """
        if self.alignment is None:
            without(checkpoint, "alignment.")
        then, now = checkpoint.get("config") or {}, self.config or {}
        self.initial = checkpoint.get("init_from")
        weights, told = (
            checkpoint.get("state_dict"),
            [],
        )  # not there where fsdp2 has loaded them already
        if weights:
            found = match(self, weights, then, now)
            if found.odd:
                keys = (
                    f". What changed: {shorten(changes)}"
                    if (changes := backbone_changes(then, now))
                    else ""
                )
                raise CheckpointLoadError(
                    f"the checkpoint is of another network than backbone, ema or code are now of: "
                    f"{shorten(found.odd)}"
                    f"{keys}. Undo the change, or begin another run: name=..."
                )
            checkpoint["state_dict"] = found.weights
            self._follow_classes(
                checkpoint.get("optimizer_states", ()), weights, found, moved_rows(then, now)
            )
            told = [
                class_change(then, now),
                f"new here: {shorten(found.new)}" if found.new else None,
            ]
        if "optimizer_states" in checkpoint:
            names = names_in_order(self, parameter_groups(self))
            fresh = state_by_name(self.configure_optimizers().state_dict(), names)
            states = [
                continued(s, fresh, self.make_optimizer, then, now)
                for s in checkpoint["optimizer_states"]
            ]
            checkpoint["optimizer_states"] = [state_by_index(state, names) for state, _ in states]
            told += [line for _, line in states]
        told.append(rate_change(then, now, checkpoint.get("global_step", 0)))
        for line in filter(None, told) if rank() == 0 else ():
            log.info(line)

    def _follow_classes(
        self, states: Any, weights: Mapping[str, Tensor], found: Match, rows: list[int | None]
    ) -> None:
        """Move rows of the optimizer states by name like those of the label tables, and drop what
        is not taken.
        """
        for state in states:
            kept = {
                name: values for name, values in state["state"].items() if name not in found.left
            }
            moved = {
                name: state_by_rows(kept[name], weights[name], rows)
                for name in found.tables
                if name in kept
            }
            state["state"] = kept | moved

    def shards_of(self, batch: Any) -> Iterator[tuple[Any, ...]]:
        """Those of this process: number, and a part of each of the values of ``batch``."""
        mine = self.shards // world_size()
        b = len(batch[0]) // mine
        for i in range(mine):
            part = slice(i * b, (i + 1) * b)
            yield rank() * mine + i, *(values[part] for values in batch)

    def gradients(self, shard: int, *samples: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Of a shard's loss by each of ``trained()``, taken out of ``.grad``, and the means that
        are recorded of it.
        """
        reseed(self.seed, "shard", self.global_step, shard)
        loss, means = self._loss(*samples)
        self.manual_backward(loss)
        parameters = self.trained()
        gradients = [local(torch.zeros_like(p) if p.grad is None else p.grad) for p in parameters]
        for p in parameters:
            p.grad = None
        return gradients, means

    def _loss(
        self, image: Tensor, label: Tensor, positions: Any, *condition: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What is minimised on a shard, ``()``, and the means that are recorded of it."""
        draws = Draws(self.seed, positions)
        x0 = self.space.encode(image, draws)
        if self.alignment is None:
            loss = self.objective(self.denoiser, x0, label, draws, *condition).mean()
            return loss, {"loss": loss.detach()}
        with self.alignment.inside(self.denoiser.backbone) as inner:
            loss = self.objective(self.denoiser, x0, label, draws, *condition)
        alignment = self.alignment(*inner, image)
        means = {"loss": loss.detach().mean(), "alignment": alignment.detach().mean()}
        return (loss - self.alignment.weight * alignment).mean(), means

    def _optimizer_step(self, gradients: list[Tensor]) -> Tensor:
        """Clip, step and average; returns the norm of the gradient before clipping, ``()``."""
        optimizer, step = self.optimizers(), self.global_step
        for p, gradient in zip(parameters := self.trained(), gradients, strict=True):
            p.grad = with_gradient(p, gradient)
        norm = full(nn.utils.clip_grad_norm_(parameters, self.clip))
        for group in optimizer.param_groups:  # type: ignore[union-attr]
            group["lr"] = optimizer.optimizer.defaults["lr"] * self.learning_rate(step)  # type: ignore[union-attr]
        optimizer.step()  # type: ignore[union-attr]
        optimizer.zero_grad()  # type: ignore[union-attr]
        self.ema.update(self.denoiser, step)
        return norm
