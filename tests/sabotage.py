"""``python sabotage.py HOW train.py ...``: the real door with one thing broken, or with death at a chosen place.

The deaths are SIGKILL, from inside, where no watcher could aim: in the middle of a validation or of a save.
"""

import os
import signal

from sturdy.sabotage import BREAK, main


def die(*args: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_validation() -> None:
    from sturdy.training.module import DiffusionModule

    validation_step = DiffusionModule.validation_step

    def dying(self, batch, batch_idx):
        validation_step(self, batch, batch_idx)
        die()

    DiffusionModule.validation_step = dying


def in_save() -> None:
    """The files are written, the checkpoint is not yet there."""
    import sturdy.resume.store as store

    store.fsync_directory = die


def in_samples() -> None:
    import sturdy.training.callbacks.samples as samples

    samples.save_png = die


if __name__ == "__main__":
    main(BREAK | {"die-in-validation": in_validation, "die-in-save": in_save, "die-in-samples": in_samples})
