"""Lightning's strategies, without what would change the bits of a run.

single    one process
ddp       each process has all parameters; ``exact_resume.reduction`` sums their gradients
fsdp2     each process has a part of all parameters (``fully_shard`` of torch.distributed)

All write the same checkpoint: the full state, by name. If checkpoints are sharded, fsdp2 cuts the
same state into parts, and all read that, too.
"""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn
from typing_extensions import override

from exact_resume.checkpoint.writer import StoreCheckpointIO
from exact_resume.distributed import world_size
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


def shard_parameters(module: L.LightningModule, network: nn.Module) -> None:
    """Cut the parameters of ``network`` over the processes, layer by layer, under ``fsdp2``.

    Under other strategies ``module`` has no mesh of devices, and nothing is done.
    """
    if module.device_mesh is None:
        return
    from torch.distributed.fsdp import fully_shard

    mesh = module.device_mesh["data_parallel"]
    for layers in [m for m in network.modules() if isinstance(m, nn.ModuleList)]:
        for layer in layers:
            has_parameters = any(True for _ in layer.parameters())
            if has_parameters and not isinstance(layer, nn.ModuleList):
                fully_shard(layer, mesh=mesh)
    # Also what no backward pass follows must be cut again: samples and validation.
    fully_shard(network, mesh=mesh, reshard_after_forward=True)


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
