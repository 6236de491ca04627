"""Weights of one network for another that may know other classes.

    row of a class = the row of the class of that name there, or a fresh one;    null label = null
    label there

A label table is a parameter with a row for each class and a last one for the null label. A backbone
may name its own in an attribute ``label_tables = ("label.weight",)``; else every ``nn.Embedding``
of num_classes + 1 rows is one.
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
    """What of a checkpoint fits a module.

    Attributes:
        weights: a tensor for each name of the module: the checkpoint's, or its own where nothing
            fits.
        tables: label tables whose rows were put in another order.
        new: names of the module of which nothing fits, because classes or conditions are others.
        left: names of the checkpoint that are not taken, for the same reason.
        odd: names in the module or in the checkpoint that differ for any other reason.
    """

    weights: dict[str, Tensor]
    tables: list[str]
    new: list[str]
    left: list[str]
    odd: list[str]


def match(module: nn.Module, given: Mapping[str, Tensor], then: Config, now: Config) -> Match:
    """Fit the weights ``given``, of a network with the config ``then``, to ``module`` with the
    config ``now``.

    The values of ``module`` are read and not changed. Without a list of classes in both configs no
    row is moved.
    """
    own, rows = module.state_dict(), moved_rows(then, now)
    tables = [
        name
        for name in (label_tables(module, len(now["classes"])) if rows else ())
        if name in given and given[name].shape == (len(then["classes"]) + 1, *own[name].shape[1:])
    ]
    moved = {name: by_rows(own[name], given[name], rows) for name in tables}
    odd = mismatched_names(own | moved, dict(given) | moved)
    new = [name for name in odd if name in own]
    left = [name for name in odd if name in given]
    unexplained = [
        name for name in odd if not _from_data(own.get(name), given.get(name), then, now)
    ]
    taken = {name: tensor for name, tensor in given.items() if name in own and name not in odd}
    return Match(own | taken | moved, tables, new, left, unexplained)


def _from_data(own: Tensor | None, given: Tensor | None, then: Config, now: Config) -> bool:
    """Return whether a weight differs because of the data: it has a row a class, or a column a
    condition.

    It is in both networks with other such numbers, or in one, where the other has none.
    """
    known = own if own is not None else given
    if known is None or known.ndim != 2:
        return False
    counts = [
        (len(config.get("classes", ())), config.get("num_conditions", 0)) for config in (then, now)
    ]
    for dim, (before, after) in enumerate(zip(*counts, strict=True)):
        null = 1 - dim  # the row of the null label
        if own is None or given is None:
            count = before if own is None else after
            if not (before and after) and known.shape[dim] == count + null and count:
                return True
        elif (given.shape[dim], own.shape[dim]) == (
            before + null,
            after + null,
        ) and before != after:
            return given.shape[1 - dim] == own.shape[1 - dim]
    return False


def label_tables(module: nn.Module, num_classes: int) -> list[str]:
    """Return the names of the label tables in ``module``; without classes there are none."""
    parts = dict(module.named_modules()) if num_classes else {}
    told = [
        f"{path}.{name}".lstrip(".")
        for path, part in parts.items()
        for name in getattr(part, "label_tables", ())
    ]
    return told or [
        f"{path}.weight".lstrip(".")
        for path, part in parts.items()
        if isinstance(part, nn.Embedding) and part.num_embeddings == num_classes + 1
    ]


def moved_rows(then: Config, now: Config) -> list[int | None]:
    """Return for each row of a label table the row there that it comes from, None for a new class.

    The list is empty where no row moves: the classes are the same, or one of the two has none.
    """
    old, new = list(then.get("classes", ())), list(now.get("classes", ()))
    if not old or not new or old == new:
        return []
    return [*(old.index(name) if name in old else None for name in new), len(old)]


def by_rows(own: Tensor, given: Tensor, rows: Sequence[int | None]) -> Tensor:
    """Return a copy of ``own`` whose row ``i`` is row ``rows[i]`` of ``given``, where that is not
    None.
    """
    out = own.detach().clone()
    for i, row in enumerate(rows):
        if row is not None:
            out[i] = given[row]
    return out


def state_by_rows(
    state: Mapping[str, Any], given: Tensor, rows: Sequence[int | None]
) -> dict[str, Any]:
    """Return the optimizer's ``state`` of the label table ``given`` for a table of ``rows``; new
    rows are zeros.

    Tensors without a row for each class, such as the count of steps, are kept.
    """

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim != given.ndim or len(value) != len(given):
            return value
        return by_rows(value.new_zeros(len(rows), *value.shape[1:]), value, rows)

    return {key: moved(value) for key, value in state.items()}


def class_change(then: Config, now: Config) -> str | None:
    """Return a sentence on the classes that differ between two configs; None if they are the
    same.
    """
    old, new = list(then.get("classes", ())), list(now.get("classes", ()))
    if old == new:
        return None
    come, gone = (
        [name for name in new if name not in old],
        [name for name in old if name not in new],
    )
    changes = [shorten(come) + (" is new" if len(come) == 1 else " are new")] if come else []
    changes += [shorten(gone) + (" is gone" if len(gone) == 1 else " are gone")] if gone else []
    rows = "; rows by name" if old and new else ""
    return f"{len(old)} -> {len(new)} classes: {', '.join(changes) or 'in another order'}{rows}"


def backbone_changes(then: Config, now: Config) -> list[str]:
    """Return the keys of the backbone that differ, but for those that the data decide:
    ``backbone.width 64 -> 32``.
    """
    if "backbone" not in then or "backbone" not in now:
        return []
    old, new = flatten(then["backbone"]), flatten(now["backbone"])
    return [
        f"backbone.{key} {old.get(key, 'nothing')} -> {new.get(key, 'nothing')}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, ...) != new.get(key, ...) and key not in FROM_DATA
    ]


def shorten(names: Sequence[str], most: int = 5) -> str:
    """Return the first names as a list for people."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
