"""Decide whether a run's command is worth starting again: for the script of a cluster's job.

    train the run; code=$?
    python -m exact_resume again runs/cars --code $code && scontrol requeue $SLURM_JOB_ID

The answer is no
    after 0, 2 and 130: finished, refused, or stopped at once by the user;
    inside a SLURM job that is being cancelled;
    after ``PATIENCE`` starts in a row without a new checkpoint: each would end as the last did.
"""

import json
import os
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from exact_resume.files import atomic_write, make_directory
from exact_resume.signals import EXIT_INTERRUPTED
from exact_resume.supervisor import EXIT_FINISHED, EXIT_REFUSED, describe_checkpoint

PATIENCE = 5
FINAL = {
    EXIT_FINISHED: "it is finished",
    EXIT_REFUSED: "it was refused, and would be again",
    EXIT_INTERRUPTED: "it was stopped by hand",
}


def again(run: Path, code: int | None = None, *, patience: int = PATIENCE) -> int:
    """Say whether the command of ``run`` is worth starting again.

    Args:
        run: the run's directory; it may not be there yet.
        code: with which the command ended; None where the launcher hides it, as torchrun does.
        patience: after so many answers in a row at the same newest checkpoint it is no. They are
            counted by machine, as each has a script of its own.

    Returns:
        The exit code: 0 for yes, 1 for no.
    """
    if code in FINAL:
        return _no(run, FINAL[code])
    if state := cancelling_state():
        return _no(run, f"SLURM says that the job is {state}")
    newest = _newest_step(run)
    asked = _count(run, newest)
    if asked > patience:
        return _no(run, f"{patience} starts in a row ended without a new checkpoint")
    print(f"{run}: start {asked} of {patience} at this checkpoint; {describe_checkpoint(newest)}")
    return 0


def cancelling_state() -> str | None:
    """Return the state of the SLURM job that this is in, if SLURM is about to end it for good.

    scancel and the loss of a node send the same signal as a preemption does.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if not job:
        return None
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        # The last element's job id is that of the whole array.
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    command = ["squeue", "--noheader", "--format=%T", f"--jobs={job}"]
    state = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return None if state in ("RUNNING", "") else state


def _newest_step(run: Path) -> int:
    """Return the step of the newest checkpoint, or -1; as ``Run.newest_step`` without torch."""
    names = [path.name for path in (run / "checkpoints").glob("step-*")]
    return max((int(name[5:]) for name in names if name[5:].isdecimal()), default=-1)


def _no(run: Path, reason: str) -> int:
    print(f"{run} is not started again: {reason}", file=sys.stderr)
    return 1


def _count(run: Path, newest: int) -> int:
    """Return how often this machine has asked since step ``newest`` was saved; remember it."""
    path = run / f".again-{socket.gethostname()}"
    asked = 1
    with suppress(OSError, ValueError, TypeError, KeyError):
        before = json.loads(path.read_bytes())
        if before["newest"] == newest:
            asked = int(before["asked"]) + 1
    make_directory(run)
    with atomic_write(path) as file:
        file.write(json.dumps({"newest": newest, "asked": asked}).encode())
    return asked
