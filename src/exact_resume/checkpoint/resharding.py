"""Read a sharded checkpoint: whole in one process, or each process its own pieces.

torch.distributed.checkpoint plans which pieces of the stored tensors make up the wanted ones, for
any two numbers of processes. ``sharded.py`` has the files.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from exact_resume.checkpoint.integrity import CheckpointLoadError, CorruptCheckpointError
from exact_resume.checkpoint.parts import PART_NAME, Piece, list_pieces, read_part
from exact_resume.checkpoint.schema import PARTS, STORED_PATH, map_leaves


def join(directory: Path, state: Mapping[str, Any], device: Any = "cpu") -> dict[str, Any]:
    """Return the full state of a sharded checkpoint, as if it had never been cut.

    Args:
        directory: of the checkpoint.
        state: the content of its ``state.ckpt``, verified.
        device: where the tensors are put together.

    Raises:
        CorruptCheckpointError: if a part does not verify, or a piece of a tensor is missing.
    """
    targets: dict[str, Tensor] = {}

    def allocate(path: str, value: Any) -> Any:
        if not _is_cut(value):
            return value
        stored = getattr(value, STORED_PATH)
        targets[stored] = torch.empty_strided(
            value.shape, value.stride(), dtype=value.dtype, device=device
        )
        return targets[stored]

    rest = {name: value for name, value in state.items() if name != PARTS}
    joined: dict[str, Any] = map_leaves(allocate, rest)
    _fill(directory, state[PARTS], targets)
    return joined


def load_into(
    directory: Path, state: Mapping[str, Any], model: nn.Module, optimizers: Sequence[Optimizer]
) -> dict[str, Any]:
    """Load a sharded checkpoint into a distributed model; each process reads its pieces alone.

    They are read into the memory of the model and of its optimizers, and no second copy is made.

    Args:
        directory: of the checkpoint.
        state: the content of its ``state.ckpt``, verified; optimizer states are by parameter name.
        model: whose parameters are distributed.
        optimizers: of the model.

    Returns:
        ``state`` without the weights.

    Raises:
        CorruptCheckpointError: as ``join``; the model must then not be used.
        CheckpointLoadError: if the checkpoint is of another network or another optimizer.
    """
    # First the optimizers, as making their state takes a step of size 0.
    own_states = [get_optimizer_state_dict(model, optimizer) for optimizer in optimizers]
    own_weights = cast(dict[str, Tensor], get_model_state_dict(model))
    if lacking := sorted(own_weights.keys() - state["state_dict"].keys()):
        raise CheckpointLoadError(
            f"{directory} is of another network: it has no {', '.join(lacking[:5])}"
        )
    own: dict[str, Tensor] = {}
    map_leaves(own.setdefault, {"state_dict": own_weights, "optimizer_states": own_states})
    wanted = {
        "state_dict": {name: state["state_dict"][name] for name in own_weights},
        "optimizer_states": state["optimizer_states"],
    }
    targets: dict[str, Tensor] = {}

    def find(path: str, value: Any) -> Any:
        if not _is_cut(value):
            return value
        target = own.get(path)
        if not isinstance(target, Tensor) or target.shape != value.shape:
            raise CheckpointLoadError(
                f"{directory} is of another network or optimizer: {path} has the shape "
                f"{tuple(value.shape)} there, and here "
                f"{'is none' if target is None else tuple(target.shape)}"
            )
        stored = getattr(value, STORED_PATH)
        same = target.dtype == value.dtype
        targets[stored] = target if same else torch.empty_like(target, dtype=value.dtype)
        return targets[stored]

    loaded = map_leaves(find, wanted)
    with torch.no_grad():
        _fill(directory, state[PARTS], targets)
        for name, weight in own_weights.items():
            if loaded["state_dict"][name] is not weight and weight.numel():
                weight.copy_(loaded["state_dict"][name])
    for optimizer, values in zip(optimizers, loaded["optimizer_states"], strict=True):
        set_optimizer_state_dict(model, optimizer, values)
    return {name: value for name, value in state.items() if name not in ("state_dict", PARTS)}


def _fill(directory: Path, parts: Mapping[str, Any], targets: Mapping[str, Tensor]) -> None:
    """Read the pieces of ``targets``, by path; of a distributed tensor, what this process holds."""
    stored: dict[MetadataIndex, str] = {}  # the part that has the piece
    chunks: dict[str, list[ChunkStorageMetadata]] = {path: [] for path in targets}
    for name, expected in _check_entries(parts).items():
        for piece in list_pieces(directory / name, expected):
            if piece.name not in targets:
                continue
            if not _is_piece_of(targets[piece.name], piece):
                raise CorruptCheckpointError(f"{name} has no piece of {piece.name} that fits")
            offsets, sizes = torch.Size(piece.offsets), torch.Size(piece.sizes)
            stored[MetadataIndex(piece.name, offsets)] = name
            chunks[piece.name].append(ChunkStorageMetadata(offsets, sizes))
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(targets), _describe(targets, chunks))
    items = planner.create_local_plan().items
    _check_complete(targets, items)
    wanted: dict[str, dict[str, list[ReadItem]]] = {}
    for item in items:
        name = stored[item.storage_index]
        wanted.setdefault(name, {}).setdefault(item.storage_index.fqn, []).append(item)
    for name, by_piece in wanted.items():
        receivers = {path: partial(_copy_piece, planner, its) for path, its in by_piece.items()}
        read_part(directory / name, parts[name], receivers)


def _copy_piece(planner: dcp.DefaultLoadPlanner, items: Iterable[ReadItem], piece: Tensor) -> None:
    """Copy a piece to where the plan says."""
    for item in items:
        source = piece
        for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
            source = source.narrow(dim, start, length)
        planner.resolve_tensor(item).detach().copy_(source)


def _is_piece_of(target: Tensor, piece: Piece) -> bool:
    if piece.dtype != target.dtype or len(piece.sizes) != target.ndim:
        return False
    box = zip(piece.offsets, piece.sizes, target.shape, strict=True)
    return all(start >= 0 and start + size <= end for start, size, end in box)


def _check_entries(parts: Any) -> dict[str, Any]:
    """Return the entry of ``state.ckpt`` about its parts, if it is one."""
    try:
        names_fit = all(PART_NAME.fullmatch(name) for name in parts)
        if names_fit and all({"bytes", "sha256"} <= entry.keys() for entry in parts.values()):
            return dict(parts)
    except (TypeError, AttributeError):
        pass
    raise CorruptCheckpointError("state.ckpt does not say which parts the checkpoint has")


def _describe(
    targets: Mapping[str, Tensor], chunks: Mapping[str, list[ChunkStorageMetadata]]
) -> Metadata:
    return Metadata(
        {
            path: TensorStorageMetadata(
                TensorProperties(dtype=target.dtype), target.shape, chunks[path]
            )
            for path, target in targets.items()
        }
    )


def _check_complete(targets: Mapping[str, Tensor], items: Iterable[ReadItem]) -> None:
    missing = {path: _local(target).numel() for path, target in targets.items()}
    for item in items:
        missing[item.dest_index.fqn] -= math.prod(item.lengths)
    if odd := sorted(path for path, elements in missing.items() if elements):
        raise CorruptCheckpointError(f"its parts do not have every element of {odd[0]}")


def _is_cut(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_meta


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
