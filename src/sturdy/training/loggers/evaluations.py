"""``evaluations.csv``, what the reports on a run found: a row for each step, number of images and seed.

Of several reports on these the newest stands. Mirrors show its rows among those of ``metrics.csv``, and of several rows
on a step the newest.
"""

import csv
from collections.abc import Mapping
from pathlib import Path

from sturdy.files import lock_file
from sturdy.training.attempt import CONSOLE
from sturdy.training.loggers.metrics_file import MetricsFile

EVALUATIONS = "evaluations.csv"  # in the run's directory
KEY = ("evaluation/n", "evaluation/seed")  # with the step, these tell one row from another


def keep(run: Path, step: int, figures: Mapping[str, float]) -> Path:
    """Make ``figures`` a row of ``step``, in the place of one with the same ``KEY``; returns the file.

    Raises:
        OSError, ValueError: if it cannot be written, or what is there cannot be read.
    """
    path = run / EVALUATIONS
    with path.with_name(f".{EVALUATIONS}.lock").open("a") as held:
        lock_file(held, wait=True)  # another report may be done at the same time
        MetricsFile(path).replace(figures, step, same=KEY)
    return path


def recorded(run: Path, last: int | None = None) -> tuple[list[dict[str, str]], dict[int, Path]]:
    """What a mirror shows of the directory ``run``, up to the step ``last``: rows in order, and pictures by step."""
    rows = [*MetricsFile(run / "metrics.csv").rows(), *_evaluations(run)]
    rows = sorted((row for row in rows if last is None or int(row["step"]) <= last), key=lambda row: int(row["step"]))
    return rows, {int(path.stem[5:]): path for path in run.glob("samples/step-*.png")}


def _evaluations(run: Path) -> list[dict[str, str]]:
    try:
        rows = MetricsFile(run / EVALUATIONS).rows()
        _ = [float(value) for row in rows for value in row.values() if value]
    except (OSError, TypeError, ValueError, csv.Error) as error:  # somebody may have edited it
        CONSOLE.warning(f"{run / EVALUATIONS} cannot be read, so no logger shows it ({error}): mend or delete it")
        return []
    return rows
