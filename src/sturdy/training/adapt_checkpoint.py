"""Fit a checkpoint to a module whose config was changed on purpose since."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from exact_resume.checkpoint.store import CheckpointLoadError
from sturdy.training.match_weights import (
    Match,
    backbone_changes,
    class_change,
    match,
    moved_rows,
    shorten,
    state_by_rows,
)
from sturdy.training.optim import parameter_groups, rate_change
from sturdy.training.optimizer_state import (
    continue_state,
    names_in_order,
    remove_prefix,
    state_by_index,
    state_by_name,
)


def adapt_checkpoint(checkpoint: dict[str, Any], module: Any) -> list[str]:
    """Change ``checkpoint`` so that a ``DiffusionModule`` can load it.

    The rows of label tables, and their optimizer state, follow the names of the classes. Another
    kind of optimizer starts with an empty state. If alignment was switched off, its projection and
    its encoder are removed.

    Returns:
        A line for each difference.

    Raises:
        CheckpointLoadError: the weights are of another network; the message names the first.
        ValueError: the optimizer's state is of another network.
    """
    if module.alignment is None:
        remove_prefix(checkpoint, "alignment.")
    then = checkpoint.get("config") or {}
    now = module.config or {}
    changes: list[str | None] = []
    if checkpoint.get("state_dict"):  # fsdp2 has loaded the weights already
        changes += _adapt_weights(checkpoint, module, then, now)
    if "optimizer_states" in checkpoint:
        changes += _adapt_optimizer(checkpoint, module, then, now)
    changes.append(rate_change(then, now, checkpoint.get("global_step", 0)))
    return [line for line in changes if line]


def _adapt_weights(
    checkpoint: dict[str, Any],
    module: Any,
    then: Mapping[str, Any],
    now: Mapping[str, Any],
) -> list[str | None]:
    weights = checkpoint["state_dict"]
    found = match(module, weights, then, now)
    if found.odd:
        changed = backbone_changes(then, now)
        keys = f". What changed: {shorten(changed)}" if changed else ""
        raise CheckpointLoadError(
            f"the checkpoint is of another network than backbone, ema or code are now of: "
            f"{shorten(found.odd)}{keys}. Undo the change, or begin another run: name=..."
        )
    checkpoint["state_dict"] = found.weights
    rows = moved_rows(then, now)
    for state in checkpoint.get("optimizer_states", ()):
        state["state"] = _state_of_classes(state["state"], weights, found, rows)
    new = f"new here: {shorten(found.new)}" if found.new else None
    return [class_change(then, now), new]


def _state_of_classes(
    state: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    found: Match,
    rows: list[int | None],
) -> dict[str, Any]:
    """Move the rows of an optimizer's state by name like those of the label tables."""
    kept = {name: values for name, values in state.items() if name not in found.left}
    for name in found.tables:
        if name in kept:
            kept[name] = state_by_rows(kept[name], weights[name], rows)
    return kept


def _adapt_optimizer(
    checkpoint: dict[str, Any],
    module: Any,
    then: Mapping[str, Any],
    now: Mapping[str, Any],
) -> list[str | None]:
    names = names_in_order(module, parameter_groups(module))
    fresh = state_by_name(module.configure_optimizers().state_dict(), names)
    changes, states = [], []
    for stored in checkpoint["optimizer_states"]:
        state, change = continue_state(stored, fresh, module.make_optimizer, then, now)
        states.append(state_by_index(state, names))
        changes.append(change)
    checkpoint["optimizer_states"] = states
    return changes
