"""Lightning's data-parallel strategy, without what would change the bits of a resumed run."""

from lightning.pytorch.strategies import DDPStrategy
from typing_extensions import override

from exact_resume.distributed import local_world_size, world_size


class DDP(DDPStrategy):
    """Each process has all parameters, and something else sums their gradients.

    In a module with gradients of its own that is the module, in a stock one ``ReduceGradients``.
    """

    @override
    def configure_ddp(self) -> None:
        # Do not wrap in DistributedDataParallel: its buckets change after the first step, so a
        # resumed run would sum in another order.
        pass


def trainer_devices() -> dict[str, int]:
    """Return the Trainer's arguments about the processes that the launcher has started."""
    return {"devices": local_world_size(), "num_nodes": world_size() // local_world_size()}
