"""The processes of one start of a run: started together, watched, and ended together.

How they end:

    a signal arrives         each process gets it once, and all have ``grace`` seconds to save
    one process exits 75     it was told to stop, and so were the others: ``grace`` seconds, too
    one process fails        the others wait for it in vain: SIGTERM after a tenth of
                             ``kill_after`` seconds, SIGKILL after ``kill_after``
"""

import math
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from subprocess import Popen

from exact_resume.signals import EXIT_RESUMABLE

DUMP_STACKS_SIGNAL = signal.SIGUSR2  # the watchdog answers it with the stacks of all threads
DUMP_WAIT_S = 0.3  # the time to write the stacks down
POLL_S = 0.1


class WorkerGroup:
    """The processes of one start, by rank.

    Args:
        signals: The signals received so far. A handler appends new ones; each is forwarded.
        grace: Seconds in which processes that were told to stop must save and exit.
        kill_after: Seconds in which the other processes must exit when one has failed.

    Attributes:
        exit_codes: The exit codes by rank, in the order of the exits; -9 is a death by SIGKILL.
        causes: Those exit codes that may be why the group ended: not 0, and not the answer to a
            SIGTERM or SIGKILL of this group.
        killed: Whether a process had to be killed because it was out of time.
    """

    def __init__(
        self, signals: Sequence[signal.Signals], *, grace: float, kill_after: float
    ) -> None:
        self.signals = signals
        self.grace = grace
        self.kill_after = kill_after
        self.processes: dict[int, Popen[bytes]] = {}
        self.exit_codes: dict[int, int] = {}
        self.causes: dict[int, int] = {}
        self.killed = False
        self._forwarded = 0  # number of signals that the processes have already got
        self._terminated = False  # whether this group has sent SIGTERM or SIGKILL by itself
        self._sigterm_at = math.inf  # of time.monotonic()
        self._sigkill_at = math.inf

    def run(self, command: Sequence[str], processes: int, restart_count: int) -> None:
        """Run ``command`` in so many processes, each in a session of its own, until all are gone.

        Args:
            command: The program and its arguments.
            processes: The number of processes.
            restart_count: The number of starts before this one.

        Raises:
            OSError: If a process cannot be started. No process is left.
        """
        try:
            with reserve_port() as port:
                for rank in range(processes):
                    variables = worker_environment(rank, processes, port, restart_count)
                    self.processes[rank] = Popen(
                        command, env=os.environ | variables, start_new_session=True
                    )
                while self.poll():
                    time.sleep(POLL_S)
        finally:
            for process in self._running():
                _kill_process_group(process)
                process.wait()

    def poll(self) -> bool:
        """Note exits, forward signals, and enforce the time limits.

        Returns:
            Whether a process still runs.
        """
        now = time.monotonic()
        self._note_exits(now)
        running = self._running()
        self._forward_signals(running, now)
        if now >= self._sigterm_at and not self._terminated:
            self._terminated = True
            for process in running:
                process.terminate()
        if now >= self._sigkill_at and running:
            self._terminated = True
            self.killed = True
            for process in running:
                process.send_signal(DUMP_STACKS_SIGNAL)
            time.sleep(DUMP_WAIT_S)
            for process in running:
                _kill_process_group(process)
        return bool(running)

    def _running(self) -> list[Popen[bytes]]:
        return [p for rank, p in self.processes.items() if rank not in self.exit_codes]

    def _note_exits(self, now: float) -> None:
        """Note which processes have exited, and set the time limits of the others."""
        new = {}
        for rank, process in self.processes.items():
            code = process.poll()
            if code is not None and rank not in self.exit_codes:
                new[rank] = code
        # If two exits are seen in one poll, the death by a signal is more likely the first.
        for rank, code in sorted(new.items(), key=lambda item: item[1]):
            self.exit_codes[rank] = code
            failed = code not in (0, EXIT_RESUMABLE)
            if failed:
                # Its data workers hold memory, and connections on which other ranks wait.
                _kill_process_group(self.processes[rank])
            if self._terminated or code == 0:
                continue
            self.causes[rank] = code
            limit = self.kill_after if failed else self.grace
            self._sigkill_at = min(self._sigkill_at, now + limit)
            if failed:
                # Ranks that fail for the same reason get time to exit by themselves.
                self._sigterm_at = min(self._sigterm_at, now + self.kill_after / 10)

    def _forward_signals(self, running: Sequence[Popen[bytes]], now: float) -> None:
        new = self.signals[self._forwarded :]
        self._forwarded += len(new)
        for number in new:
            for process in running:
                process.send_signal(number)
            at_once = signal.SIGINT in self.signals[1:]  # a SIGINT after another signal
            limit = self.kill_after if at_once else self.grace
            self._sigkill_at = min(self._sigkill_at, now + limit)


def worker_environment(rank: int, processes: int, port: int, restart_count: int) -> dict[str, str]:
    """Return the environment variables that tell a process who it is, named as torchrun does.

    The processes meet at a store that rank 0 opens on ``port`` of this machine.
    """
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "GROUP_WORLD_SIZE": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": f"exact-resume-{os.getpid()}-{restart_count}",
        "TORCHELASTIC_RESTART_COUNT": str(restart_count),
        "TORCHELASTIC_USE_AGENT_STORE": "False",
        # NCCL's errors end the process, and so the group.
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
    }


@contextmanager
def reserve_port() -> Iterator[int]:
    """Yield a free port on which rank 0 can listen, and keep it from all other programs.

    Rank 0 binds it only seconds later. Linux gives nobody else a port that is bound, and lets a
    second socket listen on it where both have SO_REUSEADDR and the first does not listen. Other
    systems do not, so there the port is only likely to stay free.
    """
    with socket.socket() as reservation:
        reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reservation.bind(("", 0))
        port = reservation.getsockname()[1]
        if sys.platform != "linux":
            reservation.close()
        yield port


def _kill_process_group(process: Popen[bytes]) -> None:
    """Kill ``process``, should it still run, and all that it has started."""
    with suppress(ProcessLookupError, PermissionError):  # macOS: the latter for an empty group
        os.killpg(process.pid, signal.SIGKILL)
