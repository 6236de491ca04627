"""Entering a run at an older step leaves a branch; what it had is kept aside in ``abandoned/NNN/``.

checkpoints, rows of metrics.csv and evaluations.csv, pictures and averages of later steps  ->
abandoned/001/

So ``auto`` never returns to it, and nothing is lost. Where no later checkpoint exists, a kill has
merely cut off what will come again.
"""

import logging
from pathlib import Path

from exact_resume.checkpoint.store import Store
from exact_resume.files import make_directory
from exact_resume.metrics import MetricsCSV
from exact_resume.resume import ResumePoint

EVALUATIONS = "evaluations.csv"

log = logging.getLogger(__name__)


def archive_newer_checkpoints(
    run: Path, store: Store, metrics: MetricsCSV, entry: ResumePoint | None
) -> None:
    """Make ``entry``, or nothing, the end of the run in directory ``run``; a crash in here loses
    nothing.
    """
    inside = entry and entry.state.parent.parent.resolve() == store.directory.resolve()
    last = (
        entry.step if entry and inside else -1
    )  # a checkpoint from elsewhere has none of this run before it
    files = [*run.glob("samples/step-*.png"), *run.glob("ema/step-*.ckpt")]
    later = [file for file in files if int(file.stem[5:]) > last]
    if newer := [step for step in store.steps() if step > last]:
        there = run / "abandoned" / f"{_next_number(run / 'abandoned'):03}"
        make_directory(there)
        evaluations = MetricsCSV(run / EVALUATIONS)
        for table in (metrics, evaluations):
            branch = MetricsCSV(there / table.path.name)
            for row in table.rows():
                if (step := int(row["step"])) > last:
                    branch.log_metrics(
                        {k: float(v) for k, v in row.items() if k != "step" and v}, step
                    )
        evaluations.cut(last)
        for file in later:
            make_directory(there / file.parent.name)
            file.rename(there / file.parent.name / file.name)
        store.move_newer(last, there)
        log.info("checkpoints newer than step %d were moved to %s: %s", max(last, 0), there, newer)
    for file in later:
        file.unlink(missing_ok=True)
    metrics.cut(last)


def _next_number(directory: Path) -> int:
    return 1 + max((int(p.name) for p in directory.glob("*") if p.name.isdigit()), default=0)
