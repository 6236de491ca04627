"""Keep ``index.html`` in the run's directory up to date: a page to watch the run."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from exact_resume.metrics import MetricsCSV
from exact_resume.page.write import write_page

CHEAP = 0.2  # seconds that a page may always take
SHARE = 0.01  # of the time that longer ones may take

log = logging.getLogger(__name__)


class Page(Callback):
    """Writes the page when training starts, after each validation, and at the end; on rank 0.

    It draws no random number and touches no tensor. A page that cannot be written is left out, with
    a warning, and training goes on. A page that takes more than ``CHEAP`` seconds is left out at
    some validations, so that all pages together take at most ``SHARE`` of the time.
    """

    def __init__(self) -> None:
        self.next = 0.0  # monotonic time before which the page is not written again
        self.last_error = ""

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.write(trainer, live=True)

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if time.monotonic() >= self.next:
            self.write(trainer, live=True)

    def write(self, trainer: L.Trainer, *, live: bool) -> None:
        """Write the page now.

        Args:
            trainer: whose logger is the record of the run.
            live: whether the run goes on, and will write the page again.
        """
        record: Any = trainer.logger
        if not trainer.is_global_zero or not isinstance(record, MetricsCSV):
            return
        begin = time.monotonic()
        try:
            write_page(record.path.parent, live=live)
        except Exception as error:  # no page is worth a step
            message = f"{type(error).__name__}: {error}"
            if message != self.last_error:
                self.last_error = message
                log.warning(f"the page of the run is not written, and training goes on: {message}")
        end = time.monotonic()
        seconds = end - begin
        self.next = end + (seconds / SHARE if seconds > CHEAP else 0.0)


@contextmanager
def last_page(trainer: L.Trainer) -> Iterator[None]:
    """Write the page once more when the block ends, however it ends.

    Whoever starts the training uses it around the block in which the last save becomes durable.
    """
    try:
        yield
    finally:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            if isinstance(callback, Page):
                callback.write(trainer, live=False)
