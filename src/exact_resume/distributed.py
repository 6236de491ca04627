"""The processes that compute one run together: rank 0 decides and writes, and what one has heard
all know.

A launcher (our supervisor, torchrun, srun) tells each process its rank; without one there is a
single process, and nothing here does anything. What is agreed on travels between CPUs, so that no
step waits for a GPU.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from exact_resume.signals import EXIT_RESUMABLE
from exact_resume.supervisor import is_launched

T = TypeVar("T")
LONG = timedelta(
    days=7
)  # a process may wait for one that decodes images; what hangs is found by the watchdog


class PeerLostError(Exception):
    """Another process of this run is gone; the launcher ends this one, too, and starts all of them
    again.
    """


def init_process_group(accelerator: str = "cpu") -> None:
    """Meet the other processes that the launcher has started; alone, do nothing."""
    launcher = cluster_environment()
    if launcher is None or launcher.world_size() == 1 or dist.is_initialized():
        return
    gpu = accelerator not in ("cpu", "mps") and torch.cuda.is_available()
    n, w = launcher.global_rank(), launcher.world_size()
    with peer_errors():
        store, *_ = next(
            dist.rendezvous(
                f"tcp://{launcher.main_address}:{launcher.main_port}", n, w, timeout=LONG
            )
        )
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpu else "gloo",
            store=dist.PrefixStore(store_prefix(w), store),
            rank=n,
            world_size=w,
            timeout=LONG,
        )


def store_prefix(processes: int) -> str:
    """Name the place in the launcher's store where all processes of this start, and of no other,
    leave their addresses.

    torchrun's store lives as long as torchrun, and has the addresses of the start before, so its
    number of restarts tells them apart. But each torchrun counts only the failures of its own
    processes. So with several machines their numbers differ, and there (docs/running.md) the store
    is made anew by rank 0 at every start.
    """
    new = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "False"
    return f"start {0 if new else os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')} of {processes}"


def destroy_process_group() -> None:
    """Part from the others, if there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def cluster_environment() -> ClusterEnvironment | None:
    """What the launcher tells about this process; None where there is none."""
    if not is_launched():
        return None
    return (
        TorchElasticEnvironment()
        if TorchElasticEnvironment.detect()
        else SLURMEnvironment(auto_requeue=False)
    )


def rank() -> int:
    """Of this process; 0 decides."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_world_size() -> int:
    """Number of processes on this machine."""
    if world_size() == 1:
        return 1
    return int(
        os.environ.get("LOCAL_WORLD_SIZE")
        or world_size() // int(os.environ.get("SLURM_NNODES", "1"))
    )


@contextmanager
def rank_zero_first() -> Iterator[None]:
    """Rank 0 goes first, and the others when it is through; where it fails they leave quietly."""
    if rank():
        wait_for_rank_zero()
    try:
        yield
    except BaseException:
        if rank() == 0:
            with suppress(PeerLostError):
                _tell(False)
        raise
    if rank() == 0:
        _tell(True)


def wait_for_rank_zero() -> None:
    """Wait until rank 0 is through with what it does ``ahead``.

    Raises:
        SystemExit: if it failed; it has said why.
    """
    if not _tell(None):
        raise SystemExit(EXIT_RESUMABLE)


def run_on_rank_zero(action: Callable[[], T]) -> T:
    """Do ``action`` in rank 0 only; what it returns, everywhere. Where it raises, the others leave
    quietly.
    """
    if world_size() == 1:
        return action()
    told: list[T | None] = [None]
    with rank_zero_first():
        if rank() == 0:
            told = [action()]
    with peer_errors():
        dist.broadcast_object_list(told)
    return told[0]  # type: ignore[return-value]


def all_reduce_max(number: int) -> int:
    """The largest ``number`` that any process has; all must ask."""
    if world_size() == 1:
        return int(number)
    told = torch.tensor(int(number))
    with peer_errors():
        dist.all_reduce(told, dist.ReduceOp.MAX)
    return int(told)


def all_gather_object(value: T) -> list[T]:
    """What each process has, by rank."""
    if world_size() == 1:
        return [value]
    told: list[T | None] = [None] * world_size()
    with peer_errors():
        dist.all_gather_object(told, value)
    return told  # type: ignore[return-value]


@contextmanager
def peer_errors() -> Iterator[None]:
    """Turn the many ways in which a collective tells that a process is gone into
    ``PeerLostError``.
    """
    try:
        yield
    except RuntimeError as error:
        if is_peer_failure(error):
            raise PeerLostError("lost another process of this run") from error
        raise


def is_peer_failure(error: BaseException) -> bool:
    """Whether ``error`` tells that another process is gone."""
    words = (
        "gloo/transport",
        "NCCL",
        "Connection closed by peer",
        "Connection reset",
        "Broken pipe",
    )
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def _tell(good: bool | None) -> bool:
    """Rank 0 tells all others whether it was ``good``."""
    if world_size() == 1:
        return True
    told = [good]
    with peer_errors():
        dist.broadcast_object_list(told)
    return bool(told[0])
