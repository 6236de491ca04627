"""How the processes of a run share its work: Lightning's strategies, without what would change the
bits.

single    one process
ddp       every process has all parameters; gradients are summed by ``exact_resume.reduction``
fsdp2     every process has a part of all parameters (fully_shard of torch.distributed)

All write the same checkpoint: the full state, by name.
"""

from typing import Any

import lightning as L
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from torch import Tensor, nn

from exact_resume.distributed import local_world_size, world_size
from sturdy.training.optimizer_state import names_in_order, state_by_index


class DDP(DDPStrategy):
    """Data-parallel training whose module sums the gradients itself; all weights start equal, as
    they are derived.
    """

    def configure_ddp(self) -> None:
        """No wrapper: its buckets and its averages have an order of their own."""


class FSDP2(ModelParallelStrategy):
    """Parameters, average and optimizer state in parts, one on each process; full states are saved
    and loaded.
    """

    def __init__(self) -> None:
        super().__init__(
            data_parallel_size=world_size(),
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
        )

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Numbered in the order of our parameter groups, as other strategies do; rank 0 has it all,
        others nothing.
        """
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            get_optimizer_state_dict,
        )

        assert self.model is not None
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_optimizer_state_dict(
            self.model, getattr(optimizer, "_optimizer", optimizer), options=options
        )
        if not state:
            return {"state": {}, "param_groups": []}
        return state_by_index(state, names_in_order(self.model, optimizer.param_groups))


def single() -> str:
    """One process.

    Raises:
        ValueError: if there are more.
    """
    if world_size() > 1:
        raise ValueError(
            f"strategy=single is one process, and there are {world_size()}; use strategy=ddp"
        )
    return "auto"


def ddp() -> Strategy | str:
    """Data-parallel; a single process needs nothing for it."""
    return DDP() if world_size() > 1 else "auto"


def fsdp2() -> Strategy | str:
    """Fully sharded; a single process has nothing to share."""
    return FSDP2() if world_size() > 1 else "auto"


class NoSignals(_SignalConnector):
    """In place of Lightning's own handlers, one of which talks to the other processes from inside a
    signal.
    """

    def register_signal_handlers(self) -> None:
        pass

    def teardown(self) -> None:
        pass


def keep_quiet(trainer: L.Trainer) -> None:
    """Leave signals to us; with several processes Lightning would also send a tensor about them at
    every step.
    """
    trainer._signal_connector = NoSignals(trainer)
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


class FitLoop(_FitLoop):
    """Lightning's, which at the last step only trains no more: whatever an end that was cut short
    has left is made.
    """

    skip = False  # type: ignore[assignment]


def end_always(trainer: L.Trainer) -> None:
    """Let ``trainer`` call ``on_train_start`` and ``on_train_end`` also where it enters at the last
    step.
    """
    loop = FitLoop(
        trainer, min_epochs=trainer.fit_loop.min_epochs, max_epochs=trainer.fit_loop.max_epochs
    )
    loop.epoch_loop = trainer.fit_loop.epoch_loop
    trainer.fit_loop = loop


def processes() -> dict[str, int]:
    """What Lightning's Trainer is to be told of those that the launcher has started."""
    return {"devices": local_world_size(), "num_nodes": world_size() // local_world_size()}


def shard_parameters(module: L.LightningModule, network: nn.Module) -> None:
    """Under ``fsdp2``, which alone gives ``module`` a mesh, cut the parameters of ``network`` layer
    by layer.
    """
    if module.device_mesh is None:
        return
    from torch.distributed.fsdp import fully_shard

    mesh = module.device_mesh["data_parallel"]
    for layers in [m for m in network.modules() if isinstance(m, nn.ModuleList)]:
        for layer in layers:
            if not isinstance(layer, nn.ModuleList) and any(True for _ in layer.parameters()):
                fully_shard(layer, mesh=mesh)
    fully_shard(network, mesh=mesh)


def local(tensor: Tensor) -> Tensor:
    """What of ``tensor`` is on this process."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def full(tensor: Tensor) -> Tensor:
    """``tensor`` put together from all processes."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def with_gradient(parameter: Tensor, gradient: Tensor) -> Tensor:
    """The ``local`` gradient as one of ``parameter``."""
    if not hasattr(parameter, "device_mesh"):
        return gradient
    from torch.distributed.tensor import DTensor

    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    return DTensor.from_local(
        gradient, mesh, placements, shape=parameter.shape, stride=parameter.stride()
    )
