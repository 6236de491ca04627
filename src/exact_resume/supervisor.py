"""A run that starts itself again: its processes are started, watched, and after a death all are
started anew.

    0          finished
    2          a mistake or a refusal; it would be one again
    130        stopped at once
    75         left on a signal and saved: again, unless the signal was ours to pass on
    any other  an exception, a kill, a hang that the watchdog ended: again

The parent does no training and imports nothing of it. Should it be killed itself, its processes die
with it.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

from exact_resume.signals import EXIT_INTERRUPTED, EXIT_RESUMABLE, SIGNALS

EXIT_FINISHED, EXIT_REFUSED, EXIT_FAILED = 0, 2, 1
SUPERVISOR = "STURDY_SUPERVISOR"  # the environment variable with its process id
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
prctl = getattr(ctypes.CDLL(None), "prctl", None)
DUMP_STACKS_SIGNAL = (
    signal.SIGUSR2
)  # to a process that is about to be killed: where are you? The watchdog answers


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
    """Run ``command`` in ``processes`` processes, and again after a death; returns the exit code
    for all of them.

    Signals are passed on, and then nothing is started any more. The processes find the number of
    lives before theirs in TORCHELASTIC_RESTART_COUNT, as under torchrun.

    Args:
        restarts: at most; with 0 the processes are only started.
        progress: the newest durable step, -1 for none.
        patience: lives in a row that may fail without moving it.
        grace: seconds to save and leave after a signal.
        kill_after: seconds that the others have to leave when one has failed.
    """
    with capture_signals() as heard:
        from exact_resume.workers import WorkerGroup, run_workers

        os.environ[SUPERVISOR] = str(os.getpid())
        newest, stuck, restart = progress(), 0, 0
        while not heard:
            life = WorkerGroup(heard, grace=grace, kill_after=kill_after)
            try:
                run_workers(command, processes, restart, life)
                code, cause = overall_exit(life.codes, life.own)
            except Exception as error:  # of whatever kind the agent knows
                code, cause = EXIT_FAILED, f"the processes could not be started: {error}"
            before, newest = newest, progress()
            stuck = stuck + 1 if newest == before else 0
            if heard:
                if life.killed:
                    print_line(
                        f"error: did not leave after {heard[0].name} and was killed; "
                        f"{describe_checkpoint(newest)}"
                    )
                return exit_after_signal(heard, life.codes, life.own)
            if code in (EXIT_FINISHED, EXIT_REFUSED, EXIT_INTERRUPTED):
                return code
            if restart == restarts:
                if code != EXIT_RESUMABLE or restarts:
                    print_line(
                        f"error: {cause}{f' after {restarts} restarts' * bool(restarts)}; "
                        f"{describe_checkpoint(newest)}"
                    )
                return code
            if stuck == patience:
                print_line(
                    f"error: {cause}; {patience} starts in a row ended without a new checkpoint; "
                    f"{describe_checkpoint(newest)}. "
                    f"The reason is above, or in the newest of attempts/ in the run's directory"
                )
                return code
            restart += 1
            print_line(f"restart {restart} of {restarts}: {cause}; {describe_checkpoint(newest)}")
        return exit_after_signal(heard, {}, {})


def overall_exit(codes: Mapping[int, int], own: Mapping[int, int]) -> tuple[int, str]:
    """The exit code of the whole, and what happened.

    Args:
        codes: of each process.
        own: of those that did not leave because we told them to, in the order in which they left.
    """
    for code in (EXIT_REFUSED, EXIT_INTERRUPTED):
        if code in codes.values():
            return code, ""
    worst = sorted(
        own.items(), key=lambda item: item[1] == EXIT_RESUMABLE
    )  # that one left quietly, after another
    if not worst:
        return EXIT_FINISHED, ""
    rank, code = worst[0]
    return code if code > 0 else EXIT_FAILED, f"process {rank} {describe_exit(code)}"


def exit_after_signal(
    heard: Sequence[signal.Signals], codes: Mapping[int, int], own: Mapping[int, int]
) -> int:
    """The exit code when we were told to stop: resumable, unless they had finished, refused, or
    could not save.
    """
    if codes and not any(codes.values()):
        return EXIT_FINISHED
    if signal.SIGINT in heard[1:]:
        return EXIT_INTERRUPTED
    code, _ = overall_exit(codes, own)
    unsaved = (
        code == EXIT_FAILED and EXIT_FAILED in own.values() and EXIT_RESUMABLE not in codes.values()
    )
    return code if code in (EXIT_REFUSED, EXIT_INTERRUPTED) or unsaved else EXIT_RESUMABLE


def describe_exit(code: int) -> str:
    """An exit code in words."""
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return "was told to stop" if code == EXIT_RESUMABLE else f"exited with code {code}"


def describe_checkpoint(step: int) -> str:
    """The newest one in words."""
    return f"newest checkpoint is step {step}" if step >= 0 else "there is no checkpoint yet"


def print_line(line: str) -> None:
    """Print ``line``; a terminal that is gone is no reason to stop training."""
    with suppress(OSError):
        print(line, file=sys.stderr if line.startswith("error") else sys.stdout, flush=True)


@contextmanager
def capture_signals() -> Iterator[list[signal.Signals]]:
    """The list of signals that were heard so far; one that is ignored stays ignored, here and in
    the processes.
    """
    heard: list[signal.Signals] = []

    def hear(number: int, frame: FrameType | None) -> None:
        heard.append(signal.Signals(number))

    before = {number: signal.getsignal(number) for number in SIGNALS}
    heeded = [number for number in SIGNALS if before[number] is not signal.SIG_IGN]
    for number in heeded:
        signal.signal(number, hear)
    try:
        yield heard
    finally:
        for number in heeded:
            signal.signal(number, before[number])


def is_launched() -> bool:
    """Whether torchrun, ``supervise`` or srun has started this process, and tells it its rank."""
    return (
        "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
    )


def die_with_parent() -> None:
    """To be called first by a process that a launcher has started: it will not outlive it, even a
    SIGKILL.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    when_parent_dies(signal.SIGKILL)
    supervisor = os.environ.get(SUPERVISOR)
    if supervisor and os.getppid() != int(supervisor):  # it died before we asked
        os.kill(os.getpid(), signal.SIGKILL)


def when_parent_dies(number: signal.Signals) -> None:
    """Have ``number`` sent to this process then; nothing where the system knows no such thing
    (Linux does).
    """
    if prctl:
        prctl(PR_SET_PDEATHSIG, number)
