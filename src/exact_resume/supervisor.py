"""Run a command in several processes, and start all of them again when one has died.

The exit code of the group says what comes next:

    0          finished
    2          a mistake or a refusal, which would come again: not started again
    130        stopped at once by the user: not started again
    75         told to stop, and saved: started again, unless the supervisor was told to stop
    any other  an exception, a kill, or a hang that the watchdog ended: started again

The supervisor itself does not train, and needs neither torch nor Lightning. If it is killed, its
processes die with it.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

from exact_resume.signals import EXIT_INTERRUPTED, EXIT_RESUMABLE, SIGNALS
from exact_resume.workers import WorkerGroup

EXIT_FINISHED = 0
EXIT_FAILED = 1
EXIT_REFUSED = 2
SUPERVISOR_PID = "EXACT_RESUME_SUPERVISOR_PID"  # an environment variable of the processes
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
prctl = getattr(ctypes.CDLL(None), "prctl", None)  # only Linux has it


def supervise(
    command: Sequence[str],
    *,
    processes: int,
    restarts: int,
    progress: Callable[[], int],
    patience: int = 3,
    grace: float = 120,
    kill_after: float = 10,
) -> int:
    """Run ``command`` in several processes until it finishes, and restart them when one dies.

    Signals are forwarded to the processes; after one, nothing is started again. The processes find
    the number of starts before theirs in TORCHELASTIC_RESTART_COUNT, as under torchrun.

    Args:
        command: The program and its arguments.
        processes: The number of processes.
        restarts: The largest number of restarts.
        progress: Returns the step of the newest checkpoint, or -1 if there is none.
        patience: Give up after so many starts in a row without a new checkpoint.
        grace: Seconds in which processes that were told to stop must save and exit.
        kill_after: Seconds in which the other processes must exit when one has failed.

    Returns:
        The exit code for all of them.
    """
    with capture_signals() as signals:
        os.environ[SUPERVISOR_PID] = str(os.getpid())
        newest = progress()
        starts_without_progress = 0
        restart = 0
        while not signals:
            group = WorkerGroup(signals, grace=grace, kill_after=kill_after)
            try:
                group.run(command, processes, restart)
                code, cause = overall_exit(group)
            except OSError as error:
                code, cause = EXIT_FAILED, f"the processes could not be started: {error}"
            before, newest = newest, progress()
            starts_without_progress = starts_without_progress + 1 if newest == before else 0
            where = describe_checkpoint(newest)
            if signals:
                if group.killed:
                    name = signals[0].name
                    print_line(f"error: did not leave after {name} and was killed; {where}")
                return exit_after_signal(signals, group)
            if code in (EXIT_FINISHED, EXIT_REFUSED, EXIT_INTERRUPTED):
                return code
            if restart == restarts:
                if restarts:
                    print_line(f"error: {cause} after {restarts} restarts; {where}")
                elif code != EXIT_RESUMABLE:
                    print_line(f"error: {cause}; {where}")
                return code
            if starts_without_progress == patience:
                print_line(
                    f"error: {cause}; {patience} starts in a row ended without a new checkpoint; "
                    f"{where}. The reason is above, or in the newest of attempts/ in the run's "
                    f"directory"
                )
                return code
            restart += 1
            print_line(f"restart {restart} of {restarts}: {cause}; {where}")
        return EXIT_INTERRUPTED if signal.SIGINT in signals[1:] else EXIT_RESUMABLE


def overall_exit(group: WorkerGroup) -> tuple[int, str]:
    """Return the exit code for the whole group, and its cause in words."""
    for code in (EXIT_REFUSED, EXIT_INTERRUPTED):
        if code in group.exit_codes.values():
            return code, ""
    if not group.causes:
        return EXIT_FINISHED, ""
    # A process that exits with 75 may only follow one that failed.
    failed = {rank: code for rank, code in group.causes.items() if code != EXIT_RESUMABLE}
    rank, code = next(iter((failed or group.causes).items()))
    return code if code > 0 else EXIT_FAILED, f"process {rank} {describe_exit(code)}"


def exit_after_signal(signals: Sequence[signal.Signals], group: WorkerGroup) -> int:
    """Return the exit code after a signal: 75, unless the processes finished, refused or failed.

    Args:
        signals: The signals that were received, at least one.
        group: Its processes are gone.
    """
    codes = group.exit_codes.values()
    if codes and not any(codes):
        return EXIT_FINISHED
    if signal.SIGINT in signals[1:]:
        return EXIT_INTERRUPTED
    code, _ = overall_exit(group)
    if code in (EXIT_REFUSED, EXIT_INTERRUPTED):
        return code
    raised = EXIT_FAILED in group.causes.values()
    if code == EXIT_FAILED and raised and EXIT_RESUMABLE not in codes:
        return EXIT_FAILED  # it could not save
    return EXIT_RESUMABLE


def describe_exit(code: int) -> str:
    """Return an exit code in words."""
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return "was told to stop" if code == EXIT_RESUMABLE else f"exited with code {code}"


def describe_checkpoint(step: int) -> str:
    """Return the step of the newest checkpoint in words; -1 means none."""
    return f"newest checkpoint is step {step}" if step >= 0 else "there is no checkpoint yet"


def print_line(line: str) -> None:
    """Print ``line``, also if the terminal is gone: that is no reason to stop the training."""
    with suppress(OSError):
        print(line, file=sys.stderr if line.startswith("error") else sys.stdout, flush=True)


@contextmanager
def capture_signals() -> Iterator[list[signal.Signals]]:
    """Yield a list to which each signal of ``SIGNALS`` is appended when it arrives.

    A signal that is ignored stays ignored, here and in the processes.
    """
    received: list[signal.Signals] = []

    def append(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))

    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    captured = [number for number in SIGNALS if handlers[number] is not signal.SIG_IGN]
    for number in captured:
        signal.signal(number, append)
    try:
        yield received
    finally:
        for number in captured:
            signal.signal(number, handlers[number])


def is_launched() -> bool:
    """Return whether a launcher (``supervise``, torchrun or srun) has started this process."""
    return (
        "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
    )


def is_supervised() -> bool:
    """Return whether ``supervise`` has started this process."""
    return SUPERVISOR_PID in os.environ


def die_with_parent() -> None:
    """Have this process killed when its launcher dies, even by SIGKILL; call this first of all."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    signal_when_parent_dies(signal.SIGKILL)
    supervisor = os.environ.get(SUPERVISOR_PID)
    if supervisor and os.getppid() != int(supervisor):  # it died before this call
        os.kill(os.getpid(), signal.SIGKILL)


def signal_when_parent_dies(number: signal.Signals) -> None:
    """Ask the kernel to send ``number`` to this process when its parent dies; only Linux can."""
    if prctl:
        prctl(PR_SET_PDEATHSIG, number)
