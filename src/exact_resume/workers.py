"""One life of the processes of a run, from their start until all are gone, under torchrun's elastic
agent.

The agent holds the rendezvous, gives out ranks and starts the processes. How they end is ours:

    we hear a signal    each process gets it, once, and all have ``grace`` seconds to save and leave
    one leaves with 75  it was told to, and so were the others: they have ``grace`` seconds as well
    one fails           the others wait for it in vain: SIGKILL after ``kill_after``, SIGTERM after
        a tenth of it
"""

import logging
import math
import os
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from subprocess import Popen
from typing import Any

from torch.distributed.elastic.agent.server import RunResult, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server import WorkerGroup as AgentWorkers
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from exact_resume.signals import EXIT_RESUMABLE
from exact_resume.supervisor import DUMP_STACKS_SIGNAL

DUMP_WAIT = 0.3  # seconds to write down stacks


class WorkerGroup:
    """What has become of the processes so far.

    Args:
        heard: signals that came to us, to which new ones are appended.
        grace, kill_after: seconds, as above.
    """

    def __init__(self, heard: Sequence[signal.Signals], *, grace: float, kill_after: float) -> None:
        self.heard, self.grace, self.kill_after = heard, grace, kill_after
        self.forwarded = 0
        self.tell_at = self.kill_at = math.inf
        self.ended = self.killed = False  # whether we have told them to end, or killed one
        self.codes: dict[int, int] = {}  # exit codes by rank, in the order in which they came
        self.own: dict[int, int] = {}  # those of them that were no answer to our telling

    def goes_on(self, processes: Mapping[int, Popen]) -> bool:
        """Look at the ``processes`` by rank, pass on what is to be passed on; whether some still
        run.
        """
        now = time.monotonic()
        gone = {
            r: p.returncode
            for r, p in processes.items()
            if r not in self.codes and p.poll() is not None
        }
        self._note(gone, processes, now)
        running = [p for r, p in processes.items() if r not in self.codes]
        signals = self.heard[self.forwarded :]
        self.forwarded += len(signals)
        for number in signals:
            _send(running, number)
            wait = (
                self.kill_after if signal.SIGINT in self.heard[1:] else self.grace
            )  # a second time it is: at once
            self.kill_at = min(self.kill_at, now + wait)
        if now >= self.tell_at and not self.ended:
            self.ended = True
            _send(running, signal.SIGTERM)
        if now >= self.kill_at and running:
            self.ended = self.killed = True
            _send(running, DUMP_STACKS_SIGNAL)
            time.sleep(DUMP_WAIT)
            for process in running:
                _kill_group(process)
        return bool(running)

    def _note(self, gone: Mapping[int, int], processes: Mapping[int, Popen], now: float) -> None:
        for rank, code in sorted(
            gone.items(), key=lambda item: item[1]
        ):  # of two at a time, first who was killed
            self.codes[rank] = code
            if code not in (0, EXIT_RESUMABLE):
                _kill_group(
                    processes[rank]
                )  # its data workers hold memory, and connections that others wait on
            if self.ended or code == 0:
                continue
            self.own[rank] = code
            self.kill_at = min(
                self.kill_at, now + (self.grace if code == EXIT_RESUMABLE else self.kill_after)
            )
            if code != EXIT_RESUMABLE:
                self.tell_at = min(
                    self.tell_at, now + self.kill_after / 10
                )  # what fails together does so by itself


class Agent(LocalElasticAgent):
    """torchrun's agent, except that it waits for all to be gone, and leaves their end to
    ``life``.
    """

    def __init__(self, spec: WorkerSpec, life: WorkerGroup) -> None:
        super().__init__(spec, DefaultLogsSpecs(log_dir=os.devnull))
        self.life = life

    def _monitor_workers(self, worker_group: AgentWorkers) -> RunResult:
        handlers: dict[int, Any] = self._pcontext.subprocess_handlers  # type: ignore[union-attr]
        if self.life.goes_on({rank: handler.proc for rank, handler in handlers.items()}):
            return RunResult(WorkerState.HEALTHY)
        return super()._monitor_workers(worker_group)


def run_workers(command: Sequence[str], processes: int, restart: int, life: WorkerGroup) -> None:
    """Run ``command`` in that many processes until all are gone; ``life`` tells how.

    Args:
        restart: how many lives there were before; the processes find it in
            TORCHELASTIC_RESTART_COUNT.

    Raises:
        Exception: whatever the agent raises, if they could not be started or watched; then none
            runs.
    """
    _hush()
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = (
        ""  # ours stay: the agent's would raise wherever they strike
    )
    meeting = get_rendezvous_handler(
        RendezvousParameters(
            "c10d", "localhost:0", f"sturdy-{os.getpid()}-{restart}", 1, 1, local_addr="localhost"
        )
    )
    spec = WorkerSpec(
        role="trainer",
        local_world_size=processes,
        rdzv_handler=meeting,
        entrypoint=command[0],
        args=tuple(word.replace("$", "$$") for word in command[1:]),  # the agent fills in templates
        max_restarts=restart,
    )
    agent = Agent(spec, life)
    agent._remaining_restarts = 0  # whether there is another life is not the agent's business
    try:
        agent.run()
    finally:
        meeting.shutdown()


def _send(processes: Sequence[Popen], number: signal.Signals) -> None:
    for process in processes:
        process.send_signal(number)


def _kill_group(process: Popen) -> None:
    """The process, should it be alive, and whom it has started: the agent gives each a session of
    its own.
    """
    with suppress(
        ProcessLookupError, PermissionError
    ):  # macOS says the latter of a group without members
        os.killpg(process.pid, signal.SIGKILL)


def _hush() -> None:
    """What the agent logs is for those who debug it; the supervisor says the same in a line."""
    logger = logging.getLogger("torch.distributed.elastic")
    logger.addHandler(logging.NullHandler())
    logger.propagate = False
