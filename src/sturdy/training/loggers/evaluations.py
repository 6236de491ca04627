"""``evaluations.csv``, what the reports on a run found: a row for each step, number of images and
seed.

Of several reports on these the newest stands. Mirrors show its rows among those of ``metrics.csv``,
and of several rows on a step the newest.
"""

from collections.abc import Mapping
from pathlib import Path

from exact_resume.files import lock_file
from exact_resume.metrics import MetricsCSV
from exact_resume.replay import EVALUATIONS

KEY = ("evaluation/n", "evaluation/seed")  # with the step, these tell one row from another


def keep(run: Path, step: int, figures: Mapping[str, float]) -> Path:
    """Make ``figures`` a row of ``step``, in the place of one with the same ``KEY``; returns the
    file.

    Raises:
        OSError, ValueError: if it cannot be written, or what is there cannot be read.
    """
    path = run / EVALUATIONS
    with path.with_name(f".{EVALUATIONS}.lock").open("a") as held:
        lock_file(held, wait=True)  # another report may be done at the same time
        MetricsCSV(path).replace(figures, step, same=KEY)
    return path
