"""Run the jobs of a sweep one after the other, and report on them.

Each job is a process, started by the command that one could type for it alone. So its bits are
those of the run alone: threads, flags, handlers and locks of the job before it ended with its
process.
"""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import mean, stdev
from types import FrameType
from typing import Any

from exact_resume.signals import EXIT_INTERRUPTED, EXIT_RESUMABLE, SIGNALS
from exact_resume.supervisor import signal_when_parent_dies
from sturdy.cli.sweep_plan import Job

# By exit code, in the order in which a person must look at them.
OUTCOMES = {
    EXIT_INTERRUPTED: "stopped at once",
    2: "refused",
    1: "failed",
    EXIT_RESUMABLE: "stopped, and saved",
    0: "finished",
    None: "not started",
}


class Child:
    """Runs jobs one by one, and passes each signal on to the one that runs.

    A job has a process group of its own: else Ctrl-C in a terminal would reach it twice, which
    means "at once".

    Attributes:
        last_signal: the last signal that came; None while there was none.
        killed: whether a signal ended the last job, one that did not come from here.
    """

    def __init__(self) -> None:
        self.last_signal: int | None = None
        self.killed = False
        self.process: subprocess.Popen[bytes] | None = None
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._pass_on)

    def run(self, command: Sequence[str]) -> int | None:
        """Run a job; return its exit code, 1 for an unknown one, None if a signal came before."""
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until there is a process
        try:
            if self.last_signal:
                return None
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, process_group=0, preexec_fn=_prepare_child(mask)
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        code = self.process.wait()
        self.killed = code < 0
        if code < 0 and -code == self.last_signal:
            return EXIT_RESUMABLE  # it came before the job had a handler
        if code in OUTCOMES:
            return code
        ended = f"ended with exit code {code}"
        if code < 0:
            ended = f"was killed by {signal.Signals(-code).name}"
        print_line(f"the job {ended}")
        return 1

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.last_signal = number
        if self.process:
            self.process.send_signal(number)


def _prepare_child(mask: set[int | signal.Signals]) -> Callable[[], None]:
    def prepare() -> None:
        signal_when_parent_dies(
            signal.SIGTERM
        )  # a job does not outlive its sweep: it saves and leaves
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    return prepare


def run_jobs(script: str, jobs: Sequence[Job]) -> int:
    """Run the jobs on this machine, one after the other; return the worst exit code.

    A job that fails or is refused does not stop the others; a signal does.
    """
    child = Child()
    outcomes: dict[str, int | None] = dict.fromkeys(job.name for job in jobs)
    make_summary_folder(jobs)
    for number, job in enumerate(jobs, 1):
        print_line(f"job {number} of {len(jobs)}: {job.name}")
        outcomes[job.name] = child.run([sys.executable, script, *job.words])
        if child.last_signal or outcomes[job.name] in (EXIT_RESUMABLE, EXIT_INTERRUPTED):
            break
    return report(outcomes, jobs)


def make_summary_folder(jobs: Sequence[Job]) -> None:
    """Make the folder that the jobs write their summaries into, if they write any."""
    if jobs[0].summary:
        jobs[0].summary.parent.mkdir(parents=True, exist_ok=True)


def report(
    outcomes: Mapping[str, int | None], jobs: Sequence[Job] = (), *, spread: bool = True
) -> int:
    """Print how each job ended and what it reached; return the worst exit code.

    Args:
        outcomes: exit code of each job; ``None`` for one that was not started.
        jobs: to look up their results.
        spread: whether to print mean and standard deviation of their scores.
    """
    print_line(f"sweep of {len(outcomes)}:")
    scores = {job.name: score for job in jobs if (score := best_score(job.metrics))}
    rows = []
    for name, code in outcomes.items():
        row = [f"    {name}", OUTCOMES[code]]
        if name in scores:
            loss, step = scores[name]
            row.append(f"best val/loss {loss:.4f} at step {step}")
        rows.append(row)
    for line in align(rows):
        print_line(line)
    if spread and len(scores) > 1:
        losses = [loss for loss, _ in scores.values()]
        print_line(
            f"best val/loss of {len(losses)}: mean {mean(losses):.4f}, standard deviation "
            f"{stdev(losses):.4f}"
        )
    for line in align(collect_summaries(jobs)):
        print_line(line)
    codes = {EXIT_RESUMABLE if code is None else code for code in outcomes.values()}
    worst = next(code for code in OUTCOMES if code in codes)
    assert worst is not None, "a job that was not started counts as stopped"
    if worst:
        print_line(
            f"exit code {worst}: the worst is {OUTCOMES[worst]}; the same command takes up what is "
            f"not finished"
        )
    return worst


def best_score(metrics: Path | None) -> tuple[float, int] | None:
    """Return the least ``val/loss`` of a run and its step; None while there is none."""
    if not metrics or not metrics.exists():
        return None
    from exact_resume.metrics import MetricsCSV  # takes seconds: it imports Lightning

    losses = MetricsCSV(metrics).column("val/loss")
    return min(((loss, step) for step, loss in losses.items()), default=None)


def collect_summaries(jobs: Sequence[Job]) -> list[list[str]]:
    """Return a table of the swept values and what the jobs measured, its head first.

    The summaries are deleted. The table is empty if no job wrote one.
    """
    measured: list[tuple[Job, dict[str, Any]]] = []
    for job in jobs:
        if job.summary and job.summary.exists():
            measured.append((job, json.loads(job.summary.read_text())))
    for folder in {job.summary.parent for job in jobs if job.summary}:
        shutil.rmtree(folder, ignore_errors=True)
    if not measured:
        return []
    keys = list(dict.fromkeys(key for job, _ in measured for key in job.swept))
    columns = list(dict.fromkeys(name for _, summary in measured for name in summary))
    rows = [[*keys, *columns]]
    for job, summary in measured:
        values = [_format_cell(summary.get(name)) for name in columns]
        rows.append([*(job.swept.get(key, "") for key in keys), *values])
    return rows


def _format_cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a line for each row, with columns of equal width, two spaces apart."""
    widths: dict[int, int] = {}
    for row in rows:
        for column, cell in enumerate(row):
            widths[column] = max(widths.get(column, 0), len(cell))
    lines = []
    for row in rows:
        cells = [cell.ljust(widths[column]) for column, cell in enumerate(row)]
        lines.append("  ".join(cells).rstrip())
    return lines


def print_line(line: str) -> None:
    """Print ``line``; a closed terminal does not end the sweep."""
    with suppress(OSError):
        print(line, flush=True)
