"""``python signalled.py PLACE SIGNAL train.py-arguments``: the real door, and a real signal that arrives at PLACE."""

import os
import signal
import sys
from pathlib import Path

NUMBER = signal.Signals[sys.argv.pop(2)]
PLACE = sys.argv.pop(1)
ROOT = Path(__file__).resolve().parents[2]


def strike():
    os.kill(os.getpid(), NUMBER)


def before(owner, name, action, when=lambda *args: True):
    """Let ``action`` happen before each call of ``owner.name`` for which ``when`` holds."""
    original = getattr(owner, name)

    def wrapped(*args, **kwargs):
        if when(*args):
            action()
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


class OnImport:
    """Strikes when Lightning is about to be imported."""

    def find_spec(self, name, path=None, target=None):
        if name == "lightning":
            strike()


def arm():
    if PLACE == "import":
        sys.meta_path.insert(0, OnImport())
    elif PLACE == "decoding":
        from sturdy.data.cars import Cars

        before(Cars, "decode", strike, lambda cars, index: index == 40)
    elif PLACE == "sampling":
        import sturdy.training.callbacks.samples as samples

        before(samples, "sample", strike)
    else:
        from sturdy.training.module import DiffusionModule

        if PLACE == "validation":
            before(DiffusionModule, "validation_step", strike)
        elif PLACE == "last validation":
            before(DiffusionModule, "validation_step", strike, lambda module, *_: module.global_step == 12)
        elif PLACE == "step":
            before(DiffusionModule, "training_step", strike, lambda module, *_: module.global_step == 1)
        elif PLACE == "step, twice":
            before(DiffusionModule, "training_step", lambda: (strike(), strike()), lambda m, *_: m.global_step == 1)
        elif PLACE == "step, group":
            all_of_us = lambda: os.killpg(os.getpgrp(), NUMBER)  # noqa: E731
            before(DiffusionModule, "training_step", all_of_us, lambda module, *_: module.global_step == 1)


if __name__ == "__main__":
    arm()
    from sturdy.door import open_door

    open_door(ROOT / "conf" / "train.yaml", "sturdy.training.run:train")
