"""Hold a run and save into it, as the writer of a training does, until the lock is lost.

    nfs_save.py HOME FIRST CHECK SECONDS TIMEOUT

FIRST is the first step. CHECK is 1, or 0 for a writer that does not look at its lock. A save takes
SECONDS longer. TIMEOUT is for the lock, in seconds.
"""

import itertools
import os
import socket
import sys
import time
from pathlib import Path

from exact_resume.checkpoint.writer import StoreCheckpointIO
from exact_resume.run import Run

PAUSE = 3.0  # seconds between two saves


def say(*words: object) -> None:
    print(*words, flush=True)


def main(home: Path, first: int, check: bool, seconds: float, timeout: float) -> None:
    run = Run(home)
    with run.lock(timeout=timeout):
        say("locked by", os.getpid())
        if not check:
            run.store.check = lambda: None
        writer = StoreCheckpointIO(run.store, lambda state: {})
        for step in itertools.count(first):

            def begin(step: int = step) -> None:
                say("saving", step)
                time.sleep(seconds)

            writer.before_commit = begin
            state = {"global_step": step, "state_dict": {"host": socket.gethostname()}}
            writer.save_checkpoint(state, run.store.state(step))
            say("saved", step)
            time.sleep(PAUSE)


if __name__ == "__main__":
    home, first, check, seconds, timeout = sys.argv[1:]
    main(Path(home), int(first), bool(int(check)), float(seconds), float(timeout))
