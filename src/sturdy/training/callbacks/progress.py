"""How far the run is: a bar on a terminal, a plain line now and then where there is none."""

import sys
import time
from collections import deque
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback


class Progress(Callback):
    """Shows step, loss, images per second and time left.

    Args:
        refresh: seconds between updates of the bar.
        line_every: seconds between plain lines where standard output is no terminal.
    """

    def __init__(self, *, refresh: float = 0.5, line_every: float = 10.0) -> None:
        self.refresh, self.line_every = refresh, line_every
        self.window: deque[tuple[float, int]] = deque(maxlen=50)
        self.bar: Any = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.terminal = sys.stdout.isatty()
        self.window = deque([(time.monotonic(), trainer.global_step)], maxlen=50)
        self.losses: list[Any] = []
        self.shown = time.monotonic()
        if self.terminal:
            self._open_bar(trainer)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        now, step = time.monotonic(), trainer.global_step
        self.window.append((now, step))
        self.losses.append(outputs["loss"])
        if (
            now - self.shown < (self.refresh if self.terminal else self.line_every)
            and step < trainer.max_steps
        ):
            return
        (then, before), self.shown = self.window[0], now
        rate = (step - before) / max(now - then, 1e-9)
        loss = sum(float(x) for x in self.losses) / len(self.losses)
        self.losses = []
        seconds = (trainer.max_steps - step) / rate if rate else 0
        images = rate * len(batch[0]) * trainer.world_size
        text = f"loss {loss:.4f}  {images:.0f} images/s  {_clock(seconds)} left"
        if self.terminal:
            self.bar.update(self.task, completed=step, text=text)
        else:
            print(f"step {step}/{trainer.max_steps}  {text}", flush=True)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.window.clear()  # the rate is that of training
        self.window.append((time.monotonic(), trainer.global_step))
        text = f"step {trainer.global_step}  val/loss {trainer.callback_metrics['val/loss']:.4f}"
        self.bar.console.print(text, highlight=False) if self.bar else print(text, flush=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close_bar()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._close_bar()

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
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
