"""What the server remembers of its requests: Prometheus metrics, and a log of JSON lines."""

import json
import logging
import time
from logging.handlers import RotatingFileHandler
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from typing_extensions import override

from sturdy.serving.words import Words
from sturdy.serving.worker import Answer

LOG_BYTES = 10_000_000  # of the log; when it is full, it replaces serve.jsonl.1
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
BATCHES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counts of one server, for Prometheus."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "sturdy_requests", "Requests answered", ["status"], registry=self.registry
        )
        self.seconds = Histogram(
            "sturdy_request_seconds",
            "Seconds from a request to its image",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.batch = Histogram(
            "sturdy_batch_size",
            "Requests that a worker took together",
            buckets=BATCHES,
            registry=self.registry,
        )
        self.waiting = Gauge(
            "sturdy_waiting_requests", "Requests without an answer yet", registry=self.registry
        )
        self.step = Gauge(
            "sturdy_checkpoint_step", "Step that drew the last image", registry=self.registry
        )
        self.lost = Counter("sturdy_workers_lost", "Workers that died", registry=self.registry)
        self.again = Counter(
            "sturdy_requests_again", "Requests that were asked again", registry=self.registry
        )

    def count(self, answer: Answer, seconds: float) -> None:
        """Count one request."""
        self.requests.labels(str(answer.status)).inc()
        if answer.status == 200:
            self.seconds.observe(seconds)
            self.batch.observe(answer.batch)
            self.step.set(answer.step)

    def text(self) -> bytes:
        """Return all, in the text format of Prometheus."""
        return generate_latest(self.registry)


class QuietHandler(RotatingFileHandler):
    """A log whose lines are lost when the disk is full, without a traceback for each."""

    @override
    def handleError(self, record: logging.LogRecord) -> None:
        pass


class RequestLog:
    """A JSON line for each request: its words, when, how long it took, and what came of it.

    Args:
        path: of the file; the older half is in ``<path>.1``.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.handler = QuietHandler(path, maxBytes=LOG_BYTES, backupCount=1, encoding="utf8")

    def write(self, words: Words | None, answer: Answer, seconds: float) -> None:
        """Append one request; a full disk costs its line and nothing else.

        Args:
            words: None for a request that cannot be read.
            answer: to it.
            seconds: until it.
        """
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "status": answer.status}
        line |= {name: value for name, value in _asdict(words).items() if value is not None}
        if answer.step >= 0:
            line["step"] = answer.step
        line |= {"seconds": round(seconds, 4)}
        if answer.status != 200:
            line["error"] = answer.body.decode()
        message = json.dumps(line, ensure_ascii=False)
        self.handler.handle(logging.makeLogRecord({"msg": message}))


def _asdict(words: Words | None) -> dict[str, object]:
    return {} if words is None else words._asdict()
