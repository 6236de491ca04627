"""A callback that lets a signal come from outside at a step's end: it asks for it, and waits until
it is there.
"""

import os
import signal
import time

import lightning as L


class Strike(L.Callback):
    """At the end of ``step``, if ``own`` is ``wanted``, whoever started this process gets
    ``number``, and tells it.
    """

    def __init__(self, number: str, step: int, wanted: int, own: int) -> None:
        self.number, self.step, self.wanted = signal.Signals[number], step, wanted == own

    def on_train_batch_end(self, trainer: L.Trainer, *args: object) -> None:
        if trainer.global_step == self.step and self.wanted and trainer.is_global_zero:
            heard, before = [], signal.getsignal(self.number)

            def hear(number, frame):
                heard.append(number)
                before(number, frame)

            signal.signal(self.number, hear)
            os.kill(os.getppid(), self.number)
            while not heard:
                time.sleep(0.01)
            signal.signal(self.number, before)


def words(number: str, step: int, key: str, value: int) -> list[str]:
    """Overrides of train.py that add it, for where ``key`` is ``value``."""
    arguments = {
        "_target_": "striking.Strike",
        "number": number,
        "step": step,
        "wanted": value,
        "own": f"${{{key}}}",
    }
    return [f"+callbacks.strike.{name}={argument}" for name, argument in arguments.items()]
