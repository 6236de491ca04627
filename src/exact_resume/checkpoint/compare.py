"""Two checkpoints or two records, bit by bit: what differs, by name."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

PARTS = (
    "state_dict",
    "optimizer_states",
    "global_step",
)  # what training computed; the rest is told, not computed


def diff_checkpoints(
    a: Mapping[str, Any], b: Mapping[str, Any], parts: Iterable[str] = PARTS
) -> list[str]:
    """Names of the tensors and numbers under ``parts`` that differ between two ``state.ckpt``, or
    are in one only.
    """
    left, right = (_flatten({part: state.get(part) for part in parts}) for state in (a, b))
    return sorted(
        k for k in left.keys() | right.keys() if not _same(left.get(k, ...), right.get(k, ...))
    )


def mismatched_names(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """Return the sorted names of weights that only one of two networks has, or that have another
    shape.
    """
    names = own.keys() | given.keys()
    return sorted(
        k for k in names if k not in own or k not in given or own[k].shape != given[k].shape
    )


def shape_mismatches(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """Return the first five of ``mismatched_names``, for people; '' if there are none."""
    return ", ".join(mismatched_names(own, given)[:5])


def first_divergence(
    a: Iterable[Mapping[str, str]], b: Iterable[Mapping[str, str]]
) -> tuple[int, str] | None:
    """The first step at which two records differ, and in which column; None if they are equal.

    Throughput is left out: it is a property of the hour. Rows of one step are taken together, in
        any order.
    """
    left, right = _values(a), _values(b)
    odd = [k for k in left.keys() | right.keys() if left.get(k) != right.get(k)]
    return min(odd, default=None)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(_bits(a), _bits(b)))
    return type(a) is type(b) and a == b


def _bits(x: Tensor) -> Tensor:
    """As bytes, so that NaN equals itself and -0 differs from 0."""
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping | list | tuple):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        return {k: leaf for key, v in items for k, leaf in _flatten(v, f"{prefix}/{key}").items()}
    return {prefix.removeprefix("/"): value}


def _values(rows: Iterable[Mapping[str, str]]) -> dict[tuple[int, str], str]:
    return {
        (int(row["step"]), name): value
        for row in rows
        for name, value in row.items()
        if value and name != "step" and not name.endswith("per_second")
    }
