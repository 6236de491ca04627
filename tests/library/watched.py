"""``python watched.py DIRECTORY HOW``: small fits under the watchdog, of which those that hang end
the process.
"""

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from exact_resume.callbacks.watchdog import Watchdog
from tiny_module import Stream, make, trainer


class Slow(Callback):
    """Takes its time after step 3 and in the validation."""

    def __init__(self, seconds):
        self.seconds = seconds

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 3:
            time.sleep(self.seconds)


def fit(directory, *, step=lambda: None, validation=lambda: None, slow=0.0, armed=True, **limits):
    """Train for six steps, the fourth of which begins with ``step``, and validate at the end of the
    third.
    """
    module = make()
    training_step, validation_step = module.training_step, module.validation_step

    def fourth(*args):
        if module.global_step == 3:
            step()
        return training_step(*args)

    def validating(*args):
        validation()
        return validation_step(*args)

    module.training_step, module.validation_step = fourth, validating
    watchdog = Watchdog(**limits)
    watchdog.armed, watchdog.directory = armed, directory / "attempts" / "001"
    watchdog.directory.mkdir(parents=True, exist_ok=True)
    settings = {"val_check_interval": 3, "limit_val_batches": 1, "check_val_every_n_epoch": None}
    t = trainer(directory, 6, watchdog, Slow(slow), num_sanity_val_steps=0, **settings)
    t.fit(module, *(DataLoader(Stream(0), batch_size=None) for _ in range(2)))


def hang():
    """Wait for a signal in C, without letting go of the interpreter lock."""
    ctypes.PyDLL(None).pause()


def well(directory):
    fit(
        directory / "slow",
        step=lambda: time.sleep(0.7),
        validation=lambda: time.sleep(2),
        slow=2,
        at_least=1.5,
    )
    fit(directory / "usr", step=lambda: os.kill(os.getpid(), signal.SIGUSR2))
    fit(
        directory / "unarmed",
        step=lambda: time.sleep(0.5),
        armed=False,
        at_least=0.2,
        pause=0.2,
        start=0.2,
    )
    fit(directory / "unarmed usr", step=lambda: os.kill(os.getpid(), signal.SIGUSR2), armed=False)
    try:
        fit(directory / "error", step=lambda: 1 / 0, at_least=1, pause=0.5)
    except ZeroDivisionError:
        time.sleep(1)


HOW = {
    "well": well,
    "step": lambda directory: fit(directory, step=hang, at_least=2),
    "validation": lambda directory: fit(directory, validation=hang, pause=2),
}

if __name__ == "__main__":
    HOW[sys.argv[2]](Path(sys.argv[1]))
    print("lived")
