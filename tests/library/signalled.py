"""``python signalled.py PLACE SIGNAL train.py-arguments``: the real script, and a real signal that
arrives at PLACE.
"""

import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

NUMBER = signal.Signals[sys.argv.pop(2)]
PLACE = sys.argv.pop(1)
ROOT = Path(__file__).resolve().parents[2]


def strike():
    os.kill(os.getpid(), NUMBER)


def strike_group():
    """As a cluster's manager does: workers of torch tell it from a signal of their parent."""
    words = ["kill", "-s", NUMBER.name.removeprefix("SIG"), "--", f"-{os.getpgrp()}"]
    subprocess.run(words, check=True, start_new_session=True)


def before(owner, name, action, when=lambda *args: True):
    """Let ``action`` happen before each call of ``owner.name`` for which ``when`` holds."""
    original = getattr(owner, name)

    def wrapped(*args, **kwargs):
        if when(*args):
            action()
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


class OnImport:
    """Strikes when the package of that name is about to be imported."""

    def __init__(self, package):
        self.package = package

    def find_spec(self, name, path=None, target=None):
        if name == self.package:
            strike()


def arm():
    if PLACE.startswith("import "):
        sys.meta_path.insert(0, OnImport(PLACE.removeprefix("import ")))
    elif PLACE == "decoding":
        from examples.cars.source import Cars

        before(Cars, "decode", strike, lambda cars, index: index == 40)
    elif PLACE == "sampling":
        import sturdy.sampling.grid_callback as samples

        before(samples, "sample", strike)
    elif PLACE == "last grid":
        import sturdy.sampling.grid_callback as samples

        # The first grid is drawn by `sample`, too, so the second one is meant.
        count = iter(range(9))
        before(samples, "sample", strike, lambda *_: next(count) == 1)
    else:
        from sturdy.training.module import DiffusionModule

        if PLACE == "validation":
            before(DiffusionModule, "validation_step", strike)
        elif PLACE == "last validation":
            before(
                DiffusionModule,
                "validation_step",
                strike,
                lambda module, *_: module.global_step == 12,
            )
        elif PLACE == "step":
            before(
                DiffusionModule, "training_step", strike, lambda module, *_: module.global_step == 1
            )
        elif PLACE == "step, twice":
            before(
                DiffusionModule,
                "training_step",
                lambda: (strike(), strike()),
                lambda m, *_: m.global_step == 1,
            )
        elif PLACE == "step, group":
            before(
                DiffusionModule,
                "training_step",
                strike_group,
                lambda module, *_: module.global_step == 1,
            )


if __name__ == "__main__":
    sys.argv[0] = str(ROOT / "train.py")
    sys.path[0] = str(ROOT)  # as `python train.py` has it: the folder of the script
    arm()
    runpy.run_path(sys.argv[0], run_name="__main__")
