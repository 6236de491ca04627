"""``python sabotage.py FAULT train.py ...``: the real script with a fault, or killed at one place.

The kills are SIGKILL from inside, in the middle of a validation or of a save, where a watcher could
not aim. ``poison:17,40`` makes the images of each batch NaN that holds position 17 or 40.
``poison-and-signal`` and ``poison-and-die-...`` act when the batch with the last of the positions
was computed, and when its skip is recorded.
"""

import errno
import fcntl
import os
import signal
import stat
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from sturdy.fault_injection import FAULTS, main


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
    import exact_resume.checkpoint.store as store

    store.fsync_directory = die


def in_samples() -> None:
    import sturdy.sampling.grid_callback as samples

    samples.save_png = die


def in_snapshot() -> None:
    """The averages are written, their file has not yet its name."""
    import sturdy.training.callbacks.ema_snapshots as snapshots

    write = snapshots.write

    def dying(*args):
        _die_at("replace")
        return write(*args)

    snapshots.write = dying


def poison(*positions: str, then=lambda: None) -> None:
    """Prints the step and the first position of each batch, as it comes."""
    from sturdy.training.module import DiffusionModule

    training_step, poisoned = DiffusionModule.training_step, [int(p) for p in positions]

    def sick(self, batch, batch_idx):
        print(f"batch {self.global_step + 1}: {batch.positions[0]}")
        if any(p in batch.positions for p in poisoned):
            batch = batch._replace(image=batch.image * float("nan"))
        outputs = training_step(self, batch, batch_idx)
        if poisoned[-1] in batch.positions:
            then()
        return outputs

    DiffusionModule.training_step = sick


def poison_and_signal(*positions: str) -> None:
    poison(*positions, then=lambda: os.kill(os.getpid(), signal.SIGTERM))


def poison_and_die_before_the_skip(*positions: str) -> None:
    poison(*positions)
    _at_the_last_skip(positions, "replace")


def poison_and_die_after_the_skip(*positions: str) -> None:
    poison(*positions)
    _at_the_last_skip(positions, "fsync_directory")


def _at_the_last_skip(positions, name) -> None:
    """Die where the skip of the last position would be renamed into place, or right after."""
    import exact_resume.skips as skips

    add = skips.SkipLog.add

    def dying(self, skip):
        if skip.position <= int(positions[-1]) < skip.position + skip.size:
            _die_at(name)
        add(self, skip)

    skips.SkipLog.add = dying


def _die_at(name) -> None:
    """Die where the next file would be renamed into place, or where its directory would be
    synced.
    """
    from exact_resume import files

    if name == "replace":
        files.os = SimpleNamespace(**vars(os) | {"replace": die})
    else:
        files.fsync_directory = die


def throw_on_usr2() -> None:
    """SIGUSR2 is an exception, wherever the process is at that instant."""

    def throw(number: int, frame: object) -> None:
        raise RuntimeError("thrown by a test")

    signal.signal(signal.SIGUSR2, throw)


def without_locks() -> None:
    """As on a mounted Drive, or Lustre without ``flock``."""

    def missing(*args: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    fcntl.flock = fcntl.lockf = missing


def without_directory_sync() -> None:
    """As on a share of Windows, and some of FUSE."""
    fsync = os.fsync

    def files_only(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    os.fsync = files_only


def count_restarts() -> None:
    """The processes of a start meet under the number of restarts that their own launcher counts."""
    from exact_resume import distributed

    distributed.store_prefix = lambda _: f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}"


def linger() -> None:
    """The processes but rank 0 stop for good where the test asks for it, by a file in $LINGER.

    ``step``, ``agreement`` (between steps) and ``validation``; once there, the file has the ending
    ``.here``.
    """
    from exact_resume.callbacks.preemption import AgreeOnSignal
    from sturdy.training.module import DiffusionModule

    folder = Path(os.environ["LINGER"])

    def stop_before(kind: type, name: str, place: str) -> None:
        method = getattr(kind, name)

        def lingering(*args):
            if os.environ.get("RANK") != "0" and (folder / place).exists():
                (folder / place).rename(folder / f"{place}.here")
                time.sleep(100_000)
            return method(*args)

        setattr(kind, name, lingering)

    stop_before(DiffusionModule, "training_step", "step")
    stop_before(AgreeOnSignal, "on_train_batch_end", "agreement")
    stop_before(DiffusionModule, "validation_step", "validation")


TEST_FAULTS = {
    "linger": linger,
    "count-restarts": count_restarts,
    "without-locks": without_locks,
    "without-directory-sync": without_directory_sync,
    "throw-on-usr2": throw_on_usr2,
    "die-in-validation": in_validation,
    "die-in-save": in_save,
    "die-in-samples": in_samples,
    "die-in-snapshot": in_snapshot,
    "poison": poison,
    "poison-and-signal": poison_and_signal,
    "poison-and-die-before-the-skip": poison_and_die_before_the_skip,
    "poison-and-die-after-the-skip": poison_and_die_after_the_skip,
}

if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    main(FAULTS | TEST_FAULTS)
