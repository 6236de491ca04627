"""The processes that compute one run together: rank 0 decides and writes, and tells the others.

A launcher (``exact_resume.supervisor``, torchrun or srun) tells each process its rank. Without one
there is a single process, and nothing here does anything. Messages travel between CPUs, so that no
step waits for a GPU. Every function that communicates must be called by all ranks.
"""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from torch.distributed.rendezvous import rendezvous
from typing_extensions import override

from exact_resume.signals import EXIT_RESUMABLE
from exact_resume.standby import release, stand_by
from exact_resume.supervisor import is_launched, is_supervised

T = TypeVar("T")
# A process may wait long for one that decodes images; the watchdog finds what hangs.
TIMEOUT = timedelta(days=7)

# A peer is silent for a minute at most: the first question after 20 s, three more, 10 s apart.
KEEP_ALIVE = {(socket.SOL_SOCKET, socket.SO_KEEPALIVE): 1}
for _name, _value in {
    "TCP_KEEPIDLE": 20,
    "TCP_KEEPINTVL": 10,
    "TCP_KEEPCNT": 4,
    "TCP_USER_TIMEOUT": 60_000,  # milliseconds; for bytes that were sent and not acknowledged
}.items():
    if hasattr(socket, _name):  # macOS lacks some
        KEEP_ALIVE[socket.IPPROTO_TCP, getattr(socket, _name)] = _value

# Parts of the messages of errors that have no type of their own.
PEER_FAILURE_MESSAGES = (
    "gloo/transport",
    "NCCL",
    "Connection closed by peer",
    "Connection reset",
    "Broken pipe",
)


_standing_by = 0  # processes that were started and do not train
_store: dist.Store | None = None  # where the processes of this start meet


class PeerLostError(Exception):
    """Another process of this run is gone; the launcher ends this one, too, and restarts all."""


def init_process_group(accelerator: str = "cpu", *, usable: int | None = None) -> None:
    """Connect to the other processes that the launcher has started; alone, do nothing.

    Args:
        accelerator: As of Lightning's Trainer; with GPUs, their tensors are sent by NCCL.
        usable: How many processes can train; None for all. The others stand by.

    Raises:
        SystemExit: In a process that stood by, when the others leave.
    """
    global _standing_by, _store
    launcher = cluster_environment()
    if launcher is None or launcher.world_size() == 1 or dist.is_initialized():
        return
    on_gpu = accelerator not in ("cpu", "mps") and torch.cuda.is_available()
    this_rank = launcher.global_rank()
    started = launcher.world_size()
    processes = min(usable or started, started)
    address = f"tcp://{launcher.main_address}:{launcher.main_port}"
    with peer_errors():
        store, *_ = next(rendezvous(address, this_rank, started, timeout=TIMEOUT))
        _store = dist.PrefixStore(store_prefix(started), store)
        if this_rank >= processes:
            keep_connections_alive()
            stand_by(_store)
        _standing_by = started - processes
        if processes > 1:
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
                store=_store,
                rank=this_rank,
                world_size=processes,
                timeout=TIMEOUT,
            )
    keep_connections_alive()


def usable_processes(started: int, divides: Callable[[int], bool]) -> int:
    """Return the largest number of processes, up to ``started``, that ``divides`` accepts.

    Machines are used whole, or one of them in part. If nothing is accepted it is ``started``, and
    so it is under ``supervise``, where a person chose the number.
    """
    local = _started_per_machine(started)
    for number in range(started, 0, -1):
        is_even = number % local == 0 or number < local
        if is_even and divides(number) and not is_supervised():
            return number
    return started


def keep_connections_alive() -> None:
    """Let the kernel end a connection whose other end has been silent for a minute.

    A machine that loses its power or its network says nothing, and gloo would wait for it for as
    long as ``TIMEOUT``. A process that computes needs not answer, for its kernel does.
    """
    if _store is None or not Path("/proc/self/fd").is_dir():
        return
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # closed meanwhile, or not of TCP
            if not os.readlink(link).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(link.name))) as connection:
                for option, value in KEEP_ALIVE.items():
                    connection.setsockopt(*option, value)


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


def destroy_process_group(exit_code: int = 0) -> None:
    """Disconnect from the other processes, if there are any.

    Args:
        exit_code: With which this process will leave, and those that stand by.
    """
    global _standing_by, _store
    if _standing_by and _store and rank() == 0:
        release(_store, _standing_by, exit_code)
    _standing_by, _store = 0, None
    if dist.is_initialized():
        dist.destroy_process_group()


def standing_by() -> int:
    """Return how many processes were started and do not train."""
    return _standing_by


class _Torchrun(TorchElasticEnvironment):
    """As Lightning's, of the processes that train."""

    @override
    def world_size(self) -> int:
        return super().world_size() - _standing_by


class _Slurm(SLURMEnvironment):
    """As Lightning's, of the processes that train."""

    @override
    def world_size(self) -> int:
        return super().world_size() - _standing_by

    @override
    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        if not _standing_by:
            super().validate_settings(num_devices, num_nodes)


def cluster_environment() -> ClusterEnvironment | None:
    """Return what the launcher says about this process; None without a launcher."""
    if not is_launched():
        return None
    if TorchElasticEnvironment.detect():
        return _Torchrun()
    return _Slurm(auto_requeue=False)


def started_processes() -> int:
    """Return how many processes the launcher has started, on all machines."""
    launcher = cluster_environment()
    return launcher.world_size() + _standing_by if launcher else 1


def rank() -> int:
    """Return the number of this process; 0 decides."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_world_size() -> int:
    """Return the number of processes that train on this machine."""
    return min(world_size(), _started_per_machine(world_size() + _standing_by))


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


def _started_per_machine(started: int) -> int:
    if "LOCAL_WORLD_SIZE" in os.environ:
        return int(os.environ["LOCAL_WORLD_SIZE"])
    return max(1, started // int(os.environ.get("SLURM_NNODES", "1")))


def _broadcast_success(success: bool | None) -> bool:
    """Return on all ranks whether rank 0 had ``success``; the others pass None."""
    if world_size() == 1:
        return True
    box = [success]
    with peer_errors():
        dist.broadcast_object_list(box)
    return bool(box[0])
