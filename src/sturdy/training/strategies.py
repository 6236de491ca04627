"""Lightning's strategies, without what would change the bits of a run.

single    one process
ddp       each process has all parameters; ``exact_resume.reduction`` sums their gradients
fsdp2     each process has a part of all parameters (``fully_shard`` of torch.distributed), and
          the backward pass sums gradients: on the tree of ``exact_resume.reduction``, or by FSDP

All write the same checkpoint: the full state, by name. If checkpoints are sharded, fsdp2 cuts the
same state into parts, and all read that, too.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from exact_resume.checkpoint.writer import StoreCheckpointIO
from exact_resume.distributed import world_size
from exact_resume.reduction import TreeReduceScatter
from exact_resume.strategy import DDP
from sturdy.training.optimizer_state import names_in_order, state_by_index


def single() -> str:
    """Return the strategy of one process.

    Raises:
        ValueError: If there are more.
    """
    if world_size() > 1:
        raise ValueError(
            f"strategy=single is one process, and there are {world_size()}; use strategy=ddp"
        )
    return "auto"


def ddp() -> Strategy | str:
    """Return the data-parallel strategy; a single process needs none."""
    return DDP() if world_size() > 1 else "auto"


def fsdp2() -> Strategy | str:
    """Return the fully sharded strategy; a single process has nothing to share."""
    return FSDP2() if world_size() > 1 else "auto"


class FSDP2(ModelParallelStrategy):
    """Parameters, average and optimizer state in parts, one on each process.

    Checkpoints hold the full state, which process 0 gathers and writes; or, if they are sharded,
    each process writes and reads its parts.
    """

    def __init__(self) -> None:
        super().__init__(
            data_parallel_size=world_size(),
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
        )

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import get_model_state_dict

        if not self._io().sharded:
            return super().lightning_module_state_dict()
        assert self.model is not None
        return get_model_state_dict(self.model)

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
    ) -> None:
        if self._io().sharded:
            self._io().save_checkpoint(checkpoint, filepath)  # on every process
        else:
            super().save_checkpoint(checkpoint, filepath, storage_options)

    @override
    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        path = Path(self.broadcast(checkpoint_path))
        assert self.model is not None
        loaded = self._io().load_into(path, self.model, self.optimizers)
        return super().load_checkpoint(path, weights_only) if loaded is None else loaded

    def _io(self) -> StoreCheckpointIO:
        io = self.checkpoint_io
        assert isinstance(io, StoreCheckpointIO)
        return io

    @override
    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        # Numbered in the order of the parameter groups, as by other strategies. Rank 0 gets all
        # of it, and the others nothing; or each its parts.
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            get_optimizer_state_dict,
        )

        assert self.model is not None
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        whole = not self._io().sharded
        options = StateDictOptions(full_state_dict=whole, cpu_offload=whole)
        state = get_optimizer_state_dict(self.model, optimizer, options=options)
        if not state:
            return {"state": {}, "param_groups": []}
        return state_by_index(state, names_in_order(self.model, optimizer.param_groups))


def shard_parameters(module: L.LightningModule, network: nn.Module, *, tree: bool = False) -> None:
    """Cut the parameters of ``network`` over the processes, layer by layer, under ``fsdp2``.

    Under other strategies ``module`` has no mesh of devices, and nothing is done.

    Args:
        module: has the mesh.
        network: is changed.
        tree: sum gradients over processes on the tree of ``exact_resume.reduction``, instead of
            averaging them in an order of the backend's own.
    """
    if module.device_mesh is None:
        return
    from torch.distributed.fsdp import FSDPModule, fully_shard

    mesh = module.device_mesh["data_parallel"]
    for layers in [m for m in network.modules() if isinstance(m, nn.ModuleList)]:
        for layer in layers:
            has_parameters = any(True for _ in layer.parameters())
            if has_parameters and not isinstance(layer, nn.ModuleList):
                fully_shard(layer, mesh=mesh)
    # Also what no backward pass follows must be cut again: samples and validation.
    fully_shard(network, mesh=mesh, reshard_after_forward=True)
    if not tree:
        return
    for layer in [m for m in network.modules() if isinstance(m, FSDPModule)]:
        layer.set_custom_reduce_scatter(TreeReduceScatter())  # type: ignore[arg-type]
        layer.set_force_sum_reduction_for_comms(True)
        layer.set_gradient_divide_factor(1.0)  # the module divides by the number of shards
        keep_autograd_graph(layer)


def keep_autograd_graph(layer: Any) -> None:
    """Let FSDP reduce the gradients of ``layer`` without a node of its own in the autograd graph.

    FSDP puts a node before each layer, to reduce when the backward pass leaves it. So it adds up
    the gradients that a layer gives to an input before it adds those of other layers, and autograd
    alone adds each in its turn. A hook is called at the same time and leaves this order as it is.

    Args:
        layer: a module after ``fully_shard``; is changed.
    """
    state = layer._get_fsdp_state()
    for group in state._fsdp_param_groups:
        group._register_post_backward_hook = partial(_reduce_on_leaving, group)


def _reduce_on_leaving(group: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Register the hooks of one forward pass; return the inputs as they are.

    Autograd goes from the last operation to the first. When the gradient of any input is complete,
    the backward pass of the whole layer is over.
    """
    inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.requires_grad]
    if inputs and torch.is_grad_enabled():
        register_multi_grad_hook(inputs, lambda _: group.post_backward(), mode="any")
    return args, kwargs


def exact_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Return the norm of all gradients, ``()``, to the bit as from tensors that are not cut.

    They are put together from all processes one after another.
    """
    norms = [torch._foreach_norm([full(gradient)])[0] for gradient in gradients]
    return torch.linalg.vector_norm(torch.stack(norms))


def local(tensor: Tensor) -> Tensor:
    """Return the part of ``tensor`` that is on this process."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def full(tensor: Tensor) -> Tensor:
    """Return ``tensor`` put together from all processes."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def with_gradient(parameter: Tensor, gradient: Tensor) -> Tensor:
    """Return the ``local`` part of a gradient as a tensor distributed like ``parameter``."""
    if not hasattr(parameter, "device_mesh"):
        return gradient
    from torch.distributed.tensor import DTensor

    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    return DTensor.from_local(
        gradient, mesh, placements, shape=parameter.shape, stride=parameter.stride()
    )
