"""Show how far the run is: a bar on a terminal, a plain line now and then in a file."""

import sys
import time
from collections import deque
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from typing_extensions import override


class Progress(Callback):
    """Shows step, loss, images per second and time left.

    Args:
        refresh: seconds between updates of the bar.
        line_every: seconds between plain lines where standard output is no terminal.
    """

    def __init__(self, *, refresh: float = 0.5, line_every: float = 10.0) -> None:
        self.refresh = refresh
        self.line_every = line_every
        self.recent: deque[tuple[float, int]] = deque(maxlen=50)  # (time, step)
        self.losses: list[Any] = []  # since the last update
        self.bar: Any = None

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.interval = self.refresh if sys.stdout.isatty() else self.line_every
        self.shown_at = time.monotonic()
        self._restart_clock(trainer)
        self.losses = []
        if sys.stdout.isatty():
            self._open_bar(trainer)

    @override
    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        now = time.monotonic()
        step = trainer.global_step
        self.recent.append((now, step))
        self.losses.append(outputs["loss"])
        if now - self.shown_at < self.interval and step < trainer.max_steps:
            return
        first_time, first_step = self.recent[0]
        rate = (step - first_step) / max(now - first_time, 1e-9)  # steps per second
        loss = sum(float(x) for x in self.losses) / len(self.losses)
        seconds = (trainer.max_steps - step) / rate if rate else 0
        images = rate * len(batch[0]) * trainer.world_size
        text = f"loss {loss:.4f}  {images:.0f} images/s  {_clock(seconds)} left"
        if self.bar:
            self.bar.update(self.task, completed=step, text=text)
        else:
            print(f"step {step}/{trainer.max_steps}  {text}", flush=True)
        self.shown_at = now
        self.losses = []

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restart_clock(trainer)  # the rate is that of training
        text = f"step {trainer.global_step}  val/loss {trainer.callback_metrics['val/loss']:.4f}"
        if self.bar:
            self.bar.console.print(text, highlight=False)
        else:
            print(text, flush=True)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close_bar()

    @override
    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._close_bar()

    def _restart_clock(self, trainer: L.Trainer) -> None:
        self.recent.clear()
        self.recent.append((time.monotonic(), trainer.global_step))

    def _open_bar(self, trainer: L.Trainer) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar

        self.bar = Bar(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[text]}")
        )
        self.task = self.bar.add_task(
            "", total=trainer.max_steps, completed=trainer.global_step, text=""
        )
        self.bar.start()

    def _close_bar(self) -> None:
        if self.bar:
            self.bar.stop()


def _clock(seconds: float) -> str:
    """Return ``m:ss`` or ``h:mm:ss``."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
