"""A callback that has a signal arrive from outside at the end of a step, and waits for it."""

import os
import signal
import time

import lightning as L


class Strike(L.Callback):
    """Sends ``number`` to the parent at the end of ``step``, if ``own`` is ``wanted``.

    The parent (a supervisor or a sweep) forwards it to this process.
    """

    def __init__(self, number: str, step: int, wanted: int, own: int) -> None:
        self.number, self.step, self.wanted = signal.Signals[number], step, wanted == own

    def on_train_batch_end(self, trainer: L.Trainer, *args: object) -> None:
        if trainer.global_step == self.step and self.wanted and trainer.is_global_zero:
            received = []
            before = signal.getsignal(self.number)

            def note(number, frame):
                received.append(number)
                before(number, frame)

            signal.signal(self.number, note)
            os.kill(os.getppid(), self.number)
            while not received:
                time.sleep(0.01)
            signal.signal(self.number, before)


def words(number: str, step: int, key: str, value: int) -> list[str]:
    """Return the overrides of train.py that add it, to strike where ``key`` is ``value``."""
    arguments = {
        "_target_": "striking.Strike",
        "number": number,
        "step": step,
        "wanted": value,
        "own": f"${{{key}}}",
    }
    return [f"+callbacks.strike.{name}={argument}" for name, argument in arguments.items()]
