"""How good the checkpoints of a run are: the scores that lie with them, and for older ones those of
``metrics.csv``.
"""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exact_resume.checkpoint.store import CorruptCheckpointError, NoValidCheckpointError, Store

MONITOR, MODE = "val/loss", "min"  # where no manifest says which


def scores_of(run: Path, store: Store) -> tuple[str, str, dict[int, float]]:
    """Return the monitored metric of the run in the directory ``run``, ``min`` or ``max``, and the
    scores by step.

    A score may be NaN. The newest manifest says which metric is monitored.
    """
    config: Mapping[str, Any] = {}
    for step in reversed(store.steps()):
        try:
            config = store.manifest(step).get("fingerprint", {}).get("config", {})
            break
        except (CorruptCheckpointError, NoValidCheckpointError, OSError):
            continue
    monitor = config.get("callbacks.checkpoint.monitor", MONITOR)
    mode = config.get("callbacks.checkpoint.mode", MODE)
    return monitor, mode, column(run / "metrics.csv", monitor) | store.scores(monitor)


def column(path: Path, name: str) -> dict[int, float]:
    """Return a column of ``metrics.csv`` by step; what cannot be read as a number is left out."""
    try:
        with path.open(newline="") as file:
            lines = [
                line for line in file if line.endswith("\n")
            ]  # a kill may cut the last one short
        rows = list(csv.DictReader(lines))
    except (OSError, ValueError, csv.Error):
        return {}
    found = {}
    for row in rows:
        try:
            found[int(row["step"])] = float(row[name])
        except (KeyError, TypeError, ValueError):
            continue
    return found
