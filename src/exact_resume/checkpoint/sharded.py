"""Sharded checkpoints: each process writes the pieces of the tensors that it holds.

    step-00000500/
        part-00000.safetensors   the pieces of process 0
        part-00001.safetensors   the pieces of process 1
        state.ckpt               everything else; in place of each tensor that was cut, one on the
                                 device "meta", which has a shape and no bytes; SHA-256 of each part
        manifest.json            as of any checkpoint

torch.distributed.checkpoint plans who writes what and who reads what, for any two numbers of
processes, and gathers the errors of all. Its own files have a pickle that loading would execute, so
the files are those of ``parts.py``. As ``state.ckpt`` has the hashes of the parts, its own hash
stands for the whole checkpoint.

The processes meet three times for a save, all in the threads that write: for the plan, after the
parts are durable, and after process 0 has renamed the directory. They have a group of their own
for it, whose timeout bounds each wait.
"""

import math
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future
from typing_extensions import override

from exact_resume.checkpoint.integrity import CorruptCheckpointError, check_size
from exact_resume.checkpoint.parts import part_name, write_part
from exact_resume.checkpoint.schema import PARTS, map_leaves
from exact_resume.checkpoint.store import Store
from exact_resume.distributed import peer_errors

# How long one process may write its part while the others wait. Then the save has failed.
TIMEOUT = timedelta(minutes=30)


def split(state: Mapping[str, Any]) -> tuple[dict[str, Any], SavePlan | None]:
    """Separate the tensors that are distributed over processes from ``state``.

    Returns:
        ``state`` with a tensor on the device "meta" in place of each of them, and an entry with the
        pieces that this process holds, by the path of the tensor, such as
        ``state_dict/layer.weight``; and where each piece lies. Without such tensors ``state`` as it
        is, and None.
    """
    cut: dict[str, DTensor] = {}

    def take(path: str, value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        if not value.numel():
            return value.full_tensor()
        cut[path] = value
        return torch.empty_strided(
            value.shape, value.stride(), dtype=value.dtype, device="meta", requires_grad=False
        )

    rest = map_leaves(take, state)
    if not cut:
        return rest, None
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(cut))
    plan = planner.create_local_plan()
    items = [item for item in plan.items if _volume(item)]
    pieces = {path: value.to_local().detach() for path, value in cut.items()}
    return {**rest, PARTS: pieces}, replace(plan, items=items)


def new_group() -> dist.ProcessGroup:
    """Connect the writers of all processes. All processes must call it together."""
    with peer_errors():
        group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=TIMEOUT)
    return group


def commit(
    store: Store,
    state: Mapping[str, Any],
    metadata: Mapping[str, Any],
    plan: SavePlan,
    group: dist.ProcessGroup,
    before: Callable[[], None],
) -> None:
    """Write one checkpoint with the other processes; all must call it together.

    Args:
        store: the checkpoints of the run, in a directory that all processes share.
        state: of ``split``.
        metadata: further entries of the manifest; those of process 0 are written.
        plan: of ``split``.
        group: of ``new_group``.
        before: called by process 0 just before the checkpoint appears.

    Raises:
        PeerLostError: another process is gone, or did not answer in time.
        Exception: the first error of any process, on all of them.
    """
    writer = _PartWriter(store, state, metadata, before)
    try:
        with peer_errors():
            dcp.save(
                {},
                storage_writer=writer,
                planner=_Planner(plan, state[PARTS]),
                process_group=group,
            )
    except CheckpointException as error:  # it is no Exception
        failures = error.failures
        raise failures[min(failures)][0] from None
    finally:
        writer.remove_temporary()


def ask_process_zero(action: Callable[[], bool], group: dist.ProcessGroup) -> bool:
    """Call ``action`` on process 0; return its result, or raise its OSError, on all processes."""
    box: list[Any] = [None]
    if dist.get_rank(group) == 0:
        try:
            box = [action()]
        except OSError as error:
            box = [error]
    with peer_errors():
        dist.broadcast_object_list(box, src=0, group=group)
    if isinstance(box[0], OSError):
        raise box[0]
    return bool(box[0])


class _Planner(dcp.DefaultSavePlanner):
    """Plans the pieces as they were cut, and takes their bytes from the copies of them."""

    def __init__(self, plan: SavePlan, pieces: Mapping[str, Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.own = plan
        self.pieces = pieces

    @override
    def create_local_plan(self) -> SavePlan:
        return self.own

    @override
    def lookup_object(self, index: MetadataIndex) -> Any:
        return self.pieces[index.fqn]


class _PartWriter(StorageWriter):
    """Writes one part on each process, and on process 0 the rest of the checkpoint."""

    def __init__(
        self,
        store: Store,
        state: Mapping[str, Any],
        metadata: Mapping[str, Any],
        before: Callable[[], None],
    ) -> None:
        self.store = store
        self.state = state
        self.metadata = metadata
        self.before = before
        self.step: int = state["global_step"]
        self.temporary: Path | None = None  # known to process 0, which makes and removes it

    @override
    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    @override
    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    @override
    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    @override
    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        # The name is new each time: a process of an earlier start may still be writing elsewhere.
        self.temporary = self.store.stage(self.step, secrets.token_hex(4))
        paths = [f"{self.temporary.name}/{part_name(rank)}" for rank in range(len(plans))]
        return [replace(plan, storage_data=path) for plan, path in zip(plans, paths, strict=True)]

    @override
    def write_data(self, plan: SavePlan, planner: Any) -> Future[list[WriteResult]]:
        results = []
        if plan.items:
            path = self.store.directory / plan.storage_data
            pieces = [
                (item.index.fqn, tuple(item.index.offset or ()), planner.resolve_data(item))
                for item in plan.items
            ]
            entry = write_part(path, pieces)
            results = [WriteResult(MetadataIndex(path.name), int(entry["bytes"]), entry)]
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    @override
    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        assert self.temporary is not None
        files = {one.index.fqn: one.storage_data for part in results for one in part}
        for name, entry in files.items():
            try:
                check_size(self.temporary / name, entry)
            except (OSError, CorruptCheckpointError) as error:
                raise RuntimeError(
                    f"{name}, which another process wrote, does not arrive in {self.temporary} "
                    f"({error}): put the run's directory on storage that all machines share"
                ) from None
        self.before()
        state = {**self.state, PARTS: files}
        self.store.publish(self.step, self.temporary, state, files, **self.metadata)

    @classmethod
    @override
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def remove_temporary(self) -> None:
        """Free the space of a save that failed; after one that did not, nothing is left."""
        if self.temporary:
            shutil.rmtree(self.temporary, ignore_errors=True)


def _volume(item: WriteItem) -> int:
    """Return the number of elements of a piece; a process may have none of a small tensor."""
    return math.prod(item.tensor_data.chunk.sizes) if item.tensor_data else 0
