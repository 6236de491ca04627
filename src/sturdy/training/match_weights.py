"""Fit the weights of one network to another one that may know other classes.

    row of a class = the row of the class of that name there, or a fresh one
    null label     = the null label there

A label table is a parameter with one row for each class and a last row for the null label. A
backbone may name its tables in an attribute ``label_tables = ("label.weight",)``; otherwise every
``nn.Embedding`` of num_classes + 1 rows is one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from exact_resume.checkpoint.compare import mismatched_names
from exact_resume.fingerprint import flatten

FROM_DATA = ("num_classes", "conditions")  # keys of a backbone that the data decide

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Match:
    """Which weights of a checkpoint fit a module.

    Attributes:
        weights: a tensor for each name of the module: the checkpoint's, or its own.
        tables: label tables whose rows were put in another order.
        new: names of the module for which nothing fits, because classes or conditions differ.
        left: names of the checkpoint that are not taken, for the same reason.
        odd: names in the module or in the checkpoint that differ for any other reason.
    """

    weights: dict[str, Tensor]
    tables: list[str]
    new: list[str]
    left: list[str]
    odd: list[str]


def match(module: nn.Module, given: Mapping[str, Tensor], then: Config, now: Config) -> Match:
    """Fit the weights ``given`` to ``module``, whose values are read and not changed.

    Args:
        module: has the config ``now``.
        given: weights of a network with the config ``then``.
        then: without a list of classes in both configs, no row is moved.
        now: see ``then``.
    """
    own = module.state_dict()
    rows = moved_rows(then, now)
    tables = []
    for name in label_tables(module, len(now["classes"])) if rows else ():
        old_shape = (len(then["classes"]) + 1, *own[name].shape[1:])
        if name in given and given[name].shape == old_shape:
            tables.append(name)
    moved = {name: by_rows(own[name], given[name], rows) for name in tables}
    differing = mismatched_names(own | moved, dict(given) | moved)
    unexplained = []
    for name in differing:
        if not _differs_by_data(own.get(name), given.get(name), then, now):
            unexplained.append(name)
    taken = {k: tensor for k, tensor in given.items() if k in own and k not in differing}
    return Match(
        weights=own | taken | moved,
        tables=tables,
        new=[name for name in differing if name in own],
        left=[name for name in differing if name in given],
        odd=unexplained,
    )


def label_tables(module: nn.Module, num_classes: int) -> list[str]:
    """Return the names of the label tables in ``module``; without classes there are none."""
    if not num_classes:
        return []
    named = []
    embeddings = []
    for path, part in module.named_modules():
        named += [f"{path}.{name}".lstrip(".") for name in getattr(part, "label_tables", ())]
        if isinstance(part, nn.Embedding) and part.num_embeddings == num_classes + 1:
            embeddings.append(f"{path}.weight".lstrip("."))
    return named or embeddings


def moved_rows(then: Config, now: Config) -> list[int | None]:
    """Return for each row of a label table the old row that it comes from, None for a new class.

    The list is empty where no row moves: the classes are the same, or one side has none.
    """
    old = list(then.get("classes", ()))
    new = list(now.get("classes", ()))
    if not old or not new or old == new:
        return []
    rows: list[int | None] = [old.index(name) if name in old else None for name in new]
    return [*rows, len(old)]


def by_rows(own: Tensor, given: Tensor, rows: Sequence[int | None]) -> Tensor:
    """Return a copy of ``own`` whose row i is row ``rows[i]`` of ``given``, unless that is None."""
    out = own.detach().clone()
    for i, row in enumerate(rows):
        if row is not None:
            out[i] = given[row]
    return out


def state_by_rows(
    state: Mapping[str, Any], given: Tensor, rows: Sequence[int | None]
) -> dict[str, Any]:
    """Return the optimizer's ``state`` of the label table ``given`` for a table of ``rows``.

    New rows are zeros. Tensors without a row for each class, such as the step count, are kept.
    """
    moved = {}
    for key, value in state.items():
        has_rows = isinstance(value, Tensor) and value.ndim == given.ndim
        if has_rows and len(value) == len(given):
            value = by_rows(value.new_zeros(len(rows), *value.shape[1:]), value, rows)
        moved[key] = value
    return moved


def class_change(then: Config, now: Config) -> str | None:
    """Describe how the classes of two configs differ; return None if they are the same."""
    old = list(then.get("classes", ()))
    new = list(now.get("classes", ()))
    if old == new:
        return None
    added = [name for name in new if name not in old]
    removed = [name for name in old if name not in new]
    changes = []
    if added:
        changes.append(f"{shorten(added)} {'is' if len(added) == 1 else 'are'} new")
    if removed:
        changes.append(f"{shorten(removed)} {'is' if len(removed) == 1 else 'are'} gone")
    summary = ", ".join(changes) or "in another order"
    rows = "; rows by name" if old and new else ""
    return f"{len(old)} -> {len(new)} classes: {summary}{rows}"


def backbone_changes(then: Config, now: Config) -> list[str]:
    """Describe the backbone's keys that differ: ``backbone.width 64 -> 32``.

    Keys that the data decide are left out.
    """
    if "backbone" not in then or "backbone" not in now:
        return []
    old = flatten(then["backbone"])
    new = flatten(now["backbone"])
    changes = []
    for key in sorted(old.keys() | new.keys()):
        if old.get(key, ...) != new.get(key, ...) and key not in FROM_DATA:
            before = old.get(key, "nothing")
            changes.append(f"backbone.{key} {before} -> {new.get(key, 'nothing')}")
    return changes


def shorten(names: Sequence[str], most: int = 5) -> str:
    """Return the first names as a list for people."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _differs_by_data(own: Tensor | None, given: Tensor | None, then: Config, now: Config) -> bool:
    """Return whether a weight differs because of the data.

    Such a weight has a row for each class, or a column for each condition. Both networks have it
    with other numbers of these, or one has it and the other has no classes or conditions.
    """
    known = own if own is not None else given
    if known is None or known.ndim != 2:
        return False
    old_counts = (len(then.get("classes", ())), then.get("num_conditions", 0))
    new_counts = (len(now.get("classes", ())), now.get("num_conditions", 0))
    for dim, (before, after) in enumerate(zip(old_counts, new_counts, strict=True)):
        null = 1 - dim  # the row of the null label
        if own is None or given is None:
            count = before if own is None else after
            only_one_has_them = count and not (before and after)
            if only_one_has_them and known.shape[dim] == count + null:
                return True
        elif before != after:
            sizes = (given.shape[dim], own.shape[dim])
            if sizes == (before + null, after + null):
                return given.shape[1 - dim] == own.shape[1 - dim]
    return False
