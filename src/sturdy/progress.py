"""What a long job says while it runs."""

import sys
import time


class ProgressPrinter:
    """Says on standard error how far a job is and how long it will take, every ten seconds."""

    def __init__(self, what: str) -> None:
        self.what, self.start = what, time.monotonic()
        self.next = self.start + 5

    def __call__(self, done: int, total: int) -> None:
        if (now := time.monotonic()) >= self.next and done < total:
            left = (now - self.start) * (total - done) / done
            print(
                f"{self.what}: {done:,} of {total:,}, {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )
            self.next = now + 10
