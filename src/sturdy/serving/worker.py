"""A process that draws: LitServe's worker. It takes up newer checkpoints between two batches."""

import multiprocessing
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from queue import Queue
from typing import Any, NamedTuple

from litserve import LitAPI
from litserve.loops.simple_loops import BatchedLoop
from litserve.transport.base import MessageTransport
from omegaconf import DictConfig
from typing_extensions import override

from exact_resume.checkpoint.store import Store
from sturdy.errors import describe
from sturdy.sampling.loaded_run import open_run, prepare_torch
from sturdy.serving.checkpoint import CheckpointSampler, with_values
from sturdy.serving.words import Words

IDLE_S = 0.5  # seconds between two looks for a newer checkpoint while there are no requests


def in_one_line(error: Exception) -> str:
    """Return what is wrong."""
    return " ".join(describe(error).split())


class Answer(NamedTuple):
    """The answer to one request.

    Attributes:
        status: of HTTP.
        body: a PNG file, or for an error a line.
        step: of the checkpoint; -1 if none was asked.
        batch: requests that the worker took together, this one included.
    """

    status: int
    body: bytes
    step: int = -1
    batch: int = 0


class TakeWaiting(BatchedLoop):
    """A batch is what has arrived while the last batch was drawn: nothing waits for company."""

    @override
    def get_batch_requests(
        self, lit_api: LitAPI, request_queue: Queue, transport: MessageTransport
    ) -> tuple[list[Any], list[Any]]:
        assert isinstance(lit_api, Worker)
        lit_api.between_batches()
        waiting = []
        found = self.get_request(request_queue, timeout=IDLE_S)
        while found is not None:
            response_queue_id, uid, _, words = found
            waiting.append((response_queue_id, uid, words))
            if len(waiting) == lit_api.max_batch_size:
                break
            found = self.get_request(request_queue, block=False)
        if lit_api.ending and not waiting:
            os._exit(0)  # SIGTERM may come to all processes at once, while requests wait
        return waiting, []


class Worker(LitAPI):
    """Draws the images of requests.

    Args:
        cfg: of the command.
        directory: of the run.
    """

    def __init__(self, cfg: DictConfig, directory: Path) -> None:
        super().__init__(max_batch_size=cfg.serve.batch_size, loop=TakeWaiting())
        self.cfg = cfg
        self.directory = directory

    @override
    def setup(self, device: str) -> None:
        self.ending = False
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server ends its workers
        signal.signal(signal.SIGTERM, self._end_when_idle)
        prepare_torch(self.cfg)
        self.store = Store(self.directory / "checkpoints")
        self.follows = self.cfg.ckpt_path in ("last", "auto")
        self.aside: set[int] = set()  # steps that cannot be used
        self.sampler = CheckpointSampler(self.cfg, open_run(self.cfg))
        plain, guided = self.sampler.batch_sizes.values()
        bits = "no bit changes" if self.cfg.serve.exact else "the last bits may change"
        print(
            f"step {self.sampler.step} is loaded; at most {guided} images are drawn together, "
            f"{plain} without guidance: {bits}",
            flush=True,
        )

    def _end_when_idle(self, number: int, frame: object) -> None:
        self.ending = True

    def between_batches(self) -> None:
        """Take up the newest checkpoint that can be used; end if the server was killed."""
        server = multiprocessing.parent_process()
        if server is not None and not server.is_alive():
            os._exit(1)
        if not self.follows:
            return
        for step in reversed(self.store.steps()):
            if step <= self.sampler.step:
                return
            if step not in self.aside and self._take_up(step):
                return

    def _take_up(self, step: int) -> bool:
        try:
            run = open_run(with_values(self.cfg, {"ckpt_path": step}))
            self.sampler = CheckpointSampler(self.cfg, run)
        except Exception as error:  # the old checkpoint still serves
            self.aside.add(step)
            print(f"step {step} is left aside: {in_one_line(error)}", flush=True)
            return False
        print(f"step {step} is taken up", flush=True)
        return True

    @override
    def predict(self, x: Sequence[Words], **kwargs: Any) -> list[Answer]:
        step = self.sampler.step
        answers: dict[int, Answer] = {}
        for number, words in enumerate(x):
            try:
                self.sampler.check(words)
            except ValueError as error:
                answers[number] = Answer(422, in_one_line(error).encode(), step)
        good = [number for number in range(len(x)) if number not in answers]
        try:
            files = self.sampler.draw([x[number] for number in good])
            answers |= {
                n: Answer(200, file, step, len(good)) for n, file in zip(good, files, strict=True)
            }
        except Exception as error:
            line = f"it could not be drawn: {in_one_line(error)}"
            print(line, flush=True)
            answers |= {n: Answer(500, line.encode(), step) for n in good}
        return [answers[number] for number in range(len(x))]

    @override
    def unbatch(self, output: list[Answer]) -> list[Answer]:
        return output
