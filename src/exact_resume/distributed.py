"""The processes that compute one run together: rank 0 decides and writes, and tells the others.

A launcher (``exact_resume.supervisor``, torchrun or srun) tells each process its rank. Without one
there is a single process, and nothing here does anything. Messages travel between CPUs, so that no
step waits for a GPU. Every function that communicates must be called by all ranks.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from torch.distributed.rendezvous import rendezvous

from exact_resume.signals import EXIT_RESUMABLE
from exact_resume.supervisor import is_launched

T = TypeVar("T")
# A process may wait long for one that decodes images; the watchdog finds what hangs.
TIMEOUT = timedelta(days=7)

# Parts of the messages of errors that have no type of their own.
PEER_FAILURE_MESSAGES = (
    "gloo/transport",
    "NCCL",
    "Connection closed by peer",
    "Connection reset",
    "Broken pipe",
)


class PeerLostError(Exception):
    """Another process of this run is gone; the launcher ends this one, too, and restarts all."""


def init_process_group(accelerator: str = "cpu") -> None:
    """Connect to the other processes that the launcher has started; alone, do nothing.

    Args:
        accelerator: As of Lightning's Trainer; with GPUs, their tensors are sent by NCCL.
    """
    launcher = cluster_environment()
    if launcher is None or launcher.world_size() == 1 or dist.is_initialized():
        return
    on_gpu = accelerator not in ("cpu", "mps") and torch.cuda.is_available()
    this_rank = launcher.global_rank()
    processes = launcher.world_size()
    address = f"tcp://{launcher.main_address}:{launcher.main_port}"
    with peer_errors():
        store, *_ = next(rendezvous(address, this_rank, processes, timeout=TIMEOUT))
        own_store = dist.PrefixStore(store_prefix(processes), store)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=own_store,
            rank=this_rank,
            world_size=processes,
            timeout=TIMEOUT,
        )


def store_prefix(processes: int) -> str:
    """Return the name under which the processes of this start find each other in the store.

    The store of torchrun lives as long as torchrun and still has the addresses of the start before,
    so the number of restarts tells the starts apart. But each torchrun counts only the failures of
    its own processes, so on several machines these numbers differ. There rank 0 opens a new store
    at every start, as it does under ``supervise`` (docs/guides/slurm-and-clusters.md).
    """
    new_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "False"
    start = "0" if new_store else os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return f"start {start} of {processes}"


def destroy_process_group() -> None:
    """Disconnect from the other processes, if there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def cluster_environment() -> ClusterEnvironment | None:
    """Return what the launcher says about this process; None without a launcher."""
    if not is_launched():
        return None
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    return SLURMEnvironment(auto_requeue=False)


def rank() -> int:
    """Return the number of this process; 0 decides."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_world_size() -> int:
    """Return the number of processes on this machine."""
    if world_size() == 1:
        return 1
    if "LOCAL_WORLD_SIZE" in os.environ:
        return int(os.environ["LOCAL_WORLD_SIZE"])
    return world_size() // int(os.environ.get("SLURM_NNODES", "1"))


@contextmanager
def rank_zero_first() -> Iterator[None]:
    """Run the block on rank 0, then on the others; if rank 0 raises, the others exit with 75."""
    if rank():
        wait_for_rank_zero()
    try:
        yield
    except BaseException:
        if rank() == 0:
            with suppress(PeerLostError):
                _broadcast_success(False)
        raise
    if rank() == 0:
        _broadcast_success(True)


def wait_for_rank_zero() -> None:
    """Wait until rank 0 leaves its block of ``rank_zero_first``.

    Raises:
        SystemExit: With code 75, if rank 0 raised an error there. It reports the error itself.
    """
    if not _broadcast_success(None):
        raise SystemExit(EXIT_RESUMABLE)


def run_on_rank_zero(action: Callable[[], T]) -> T:
    """Call ``action`` on rank 0 only, and return its result on all ranks.

    If it raises an error on rank 0, the others exit with code 75.
    """
    if world_size() == 1:
        return action()
    box: list[Any] = [None]
    with rank_zero_first():
        if rank() == 0:
            box = [action()]
    with peer_errors():
        dist.broadcast_object_list(box)
    result: T = box[0]
    return result


def all_reduce_max(number: int) -> int:
    """Return the largest ``number`` of all ranks."""
    if world_size() == 1:
        return int(number)
    largest = torch.tensor(int(number))
    with peer_errors():
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def all_gather_object(value: T) -> list[T]:
    """Return the ``value`` of each rank, by rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    with peer_errors():
        dist.all_gather_object(values, value)
    return values


@contextmanager
def peer_errors() -> Iterator[None]:
    """Raise ``PeerLostError`` in place of the many errors by which a collective reports a loss."""
    try:
        yield
    except RuntimeError as error:
        if is_peer_failure(error):
            raise PeerLostError("lost another process of this run") from error
        raise


def is_peer_failure(error: BaseException) -> bool:
    """Return whether ``error`` says that another process is gone."""
    if isinstance(error, dist.DistError):
        return True
    message = str(error)
    return isinstance(error, RuntimeError) and any(m in message for m in PEER_FAILURE_MESSAGES)


def _broadcast_success(success: bool | None) -> bool:
    """Return on all ranks whether rank 0 had ``success``; the others pass None."""
    if world_size() == 1:
        return True
    box = [success]
    with peer_errors():
        dist.broadcast_object_list(box)
    return bool(box[0])
