"""Processes that stand by, because a batch has no equal part for them.

After the loss of a machine a launcher starts the processes that are left. Their number may not
divide the batch: then the first ones train, and the others wait until these leave.
"""

import faulthandler
import time
from typing import NoReturn

import torch.distributed as dist

from exact_resume.signals import EXIT_RESUMABLE, PreemptedError

EXIT_CODE = "exit code"  # a key of the store: rank 0 leaves with this code
LEFT = "left"  # a key of the store: how many that stood by have read the code
POLL_S = 0.5
SIGNAL_PATIENCE_S = 20.0  # to save after a signal; launchers kill after 30 s
RELEASE_PATIENCE_S = 5.0


def stand_by(store: dist.Store) -> NoReturn:
    """Wait until the processes that train leave, and leave with their exit code.

    Args:
        store: of this start; rank 0 holds it, and calls ``release``.

    Raises:
        SystemExit: always. The code is 1 if rank 0 is gone without a word, and 75 if a signal came
            here and the others did not leave.
    """
    faulthandler.cancel_dump_traceback_later()  # waiting is no hang
    deadline = float("inf")
    while time.monotonic() < deadline:
        try:
            if store.check([EXIT_CODE]):
                code = int(store.get(EXIT_CODE))
                store.add(LEFT, 1)
                raise SystemExit(code)
            time.sleep(POLL_S)
        except PreemptedError:
            deadline = time.monotonic() + SIGNAL_PATIENCE_S
        except RuntimeError:  # torch's, when the store is gone
            raise SystemExit(1) from None
    raise SystemExit(EXIT_RESUMABLE)


def release(store: dist.Store, processes: int, code: int) -> None:
    """Tell ``processes`` that stand by to leave with ``code``, and wait until they know it."""
    try:
        store.set(EXIT_CODE, str(code))
        deadline = time.monotonic() + RELEASE_PATIENCE_S
        while store.add(LEFT, 0) < processes and time.monotonic() < deadline:
            time.sleep(POLL_S / 10)
    except RuntimeError:  # torch's, when the store is gone
        return
