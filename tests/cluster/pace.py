"""A callback that makes steps slow, so that a small run lasts as long as its faults take."""

import time

import lightning as L


class Pace(L.Callback):
    """Waits after each step.

    Args:
        seconds: for so long.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_batch_end(self, *args: object) -> None:
        time.sleep(self.seconds)
