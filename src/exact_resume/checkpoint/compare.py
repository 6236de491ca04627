"""Compare two checkpoints or two records bit by bit, and name what differs."""

import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from exact_resume.checkpoint.schema import is_compared

ABSENT = object()  # equals nothing else, not even None


def diff_checkpoints(
    a: Mapping[str, Any], b: Mapping[str, Any], parts: Iterable[str] | None = None
) -> list[str]:
    """Return the sorted names of the tensors and numbers that differ, or that only one has.

    Args:
        a: the content of a ``state.ckpt``.
        b: the content of another.
        parts: the entries to compare; by default all but those that the schema excepts.
    """
    if parts is None:
        parts = [name for name in a.keys() | b.keys() if is_compared(name)]
    chosen = set(parts)
    left = dict(_flatten({name: value for name, value in a.items() if name in chosen}))
    right = dict(_flatten({name: value for name, value in b.items() if name in chosen}))
    names = left.keys() | right.keys()
    return sorted(k for k in names if not _same(left.get(k, ABSENT), right.get(k, ABSENT)))


def mismatched_names(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """Return the sorted names of weights that only one network has, or with another shape."""
    names = own.keys() | given.keys()
    return sorted(
        k for k in names if k not in own or k not in given or own[k].shape != given[k].shape
    )


def shape_mismatches(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """Return the first five of ``mismatched_names`` as text; '' if there are none."""
    return ", ".join(mismatched_names(own, given)[:5])


def first_divergence(
    a: Iterable[Mapping[str, str]], b: Iterable[Mapping[str, str]]
) -> tuple[int, str] | None:
    """Return the first step at which two records differ, and the column; None if they are equal.

    Rows of one step are taken together, in any order. Throughput is ignored: it depends on the
    machine.
    """
    left = _cells(a)
    right = _cells(b)
    different = [k for k in left.keys() | right.keys() if left.get(k) != right.get(k)]
    return min(different, default=None)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))
    if isinstance(a, float) and isinstance(b, float):
        return struct.pack("d", a) == struct.pack("d", b)  # as for tensors: NaN equals itself
    return type(a) is type(b) and bool(a == b)


def _bits(x: Tensor) -> Tensor:
    """Return the bytes of ``x``, so that NaN equals itself and -0 differs from 0."""
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested mappings and lists, each with its path, such as ``a/0/b``."""
    if isinstance(value, Mapping):
        items = [*value.items()]
    elif isinstance(value, list | tuple):
        items = [*enumerate(value)]
    else:
        yield prefix, value
        return
    for key, child in items:
        yield from _flatten(child, f"{prefix}/{key}" if prefix else str(key))


def _cells(rows: Iterable[Mapping[str, str]]) -> dict[tuple[int, str], str]:
    """Return the values of a record by step and column."""
    cells = {}
    for row in rows:
        for column, value in row.items():
            if value and column != "step" and not column.endswith("per_second"):
                cells[int(row["step"]), column] = value
    return cells
