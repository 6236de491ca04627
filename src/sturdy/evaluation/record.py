"""The main numbers of a report go into ``evaluations.csv`` of the run.

The run's loggers show them when it trains on; those of a finished run do not. An error here does
not cost the report.
"""

import csv
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exact_resume.files import lock_file
from exact_resume.metrics import MetricsCSV
from exact_resume.replay import EVALUATIONS
from exact_resume.resume import ResumePoint
from sturdy.evaluation.features import EfficientNet

log = logging.getLogger(__name__)

# With the step, these columns tell one row from another.
IDENTITY = ("evaluation/n", "evaluation/seed")
SECOND = EfficientNet.name


def record(run: Path, point: ResumePoint, numbers: Mapping[str, Any]) -> str:
    """Record the main numbers of a report.

    Args:
        run: the directory of the run.
        point: the checkpoint that was evaluated.
        numbers: of the report.

    Returns:
        A line that says where they are.
    """
    if point.state.parent.parent.resolve() != (run / "checkpoints").resolve():
        return f"its figures are not recorded: {point.state} is no checkpoint of {run}"
    try:
        path = write_row(run, point.step, main_numbers(numbers))
    except (OSError, ValueError, csv.Error) as error:
        log.warning(f"the report's figures could not be recorded in {run}: {error}")
        return "its figures are in report.json alone"
    return f"its figures are in {path}; loggers show them when the run trains on"


def write_row(run: Path, step: int, numbers: Mapping[str, float]) -> Path:
    """Write one row of ``evaluations.csv``, in the place of an older one with equal ``IDENTITY``.

    Args:
        run: the directory of the run.
        step: of the checkpoint.
        numbers: values by name.

    Returns:
        The file.

    Raises:
        OSError: it cannot be written.
        ValueError: it cannot be read.
    """
    path = run / EVALUATIONS
    with path.with_name(f".{EVALUATIONS}.lock").open("a") as held:
        lock_file(held, wait=True)  # another report may end at the same time
        MetricsCSV(path).replace(numbers, step, same=IDENTITY)
    return path


def main_numbers(numbers: Mapping[str, Any]) -> dict[str, float]:
    """Return the most important of a report's numbers, as ``evaluation/kid`` and so on.

    Distances and fractions are relative to the held-out images. Those in EfficientNet's features
    are named ``evaluation/efficientnet_kid`` and so on, whether they are the first or the second
    ones of the report. ``worst_difference`` is in percentage points.
    """
    found = {name: numbers[name] for name in ("n", "seed") if name in numbers}
    prefix = f"{SECOND}_" if numbers.get("features") == SECOND else ""
    found |= _renamed(numbers["quality"]["held_out_samples"], prefix)
    if f"quality_{SECOND}" in numbers:
        found |= _renamed(numbers[f"quality_{SECOND}"]["held_out_samples"], f"{SECOND}_")
    for space in ("pixels", "features"):
        found[f"copies_{space}"] = numbers[f"memorisation_{space}"]["copies"]
    if "class_accuracy" in numbers:
        found["class_accuracy"] = numbers["class_accuracy"]["all"]
    if "frequencies" in numbers:
        differences = [abs(f["samples"] - f["truth"]) for f in numbers["frequencies"]]
        found["worst_difference"] = 100 * max(differences)
    finite = {name: float(value) for name, value in found.items() if math.isfinite(value)}
    return {f"evaluation/{name}": value for name, value in finite.items()}


def _renamed(numbers: Mapping[str, float], prefix: str) -> dict[str, float]:
    return {f"{prefix}{name}": value for name, value in numbers.items()}
