"""Batches that were left out, because what they gave was not finite: ``skips.jsonl`` in the run's
directory.

    a skip  =  (step, position, size)  =  the batch that would have made this step

It is part of the trajectory and told by where it begins, so that it is left out whenever the run
comes by, from
whichever checkpoint: the one that was rolled back to is older than the skip and does not know it.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from exact_resume.files import atomic_write


@dataclass(frozen=True)
class SkippedBatch:
    """The batch of ``size`` positions from ``position`` on, which would have made step ``step`` of
    ``metrics.csv``.
    """

    step: int
    position: int
    size: int
    reason: str
    images: tuple[str, ...] = ()

    def __str__(self) -> str:
        last = self.position + self.size - 1
        return f"step {self.step}, positions {self.position} to {last}: {self.reason}"


class NonFiniteLossError(Exception):
    """A step gave a number that is not finite; ``skip`` is its batch."""

    def __init__(self, skip: SkippedBatch) -> None:
        super().__init__(str(skip))
        self.skip = skip


class SkipLog:
    """The skips of one run, in the order in which they were found.

    Raises:
        ValueError: if the file was damaged, naming the line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries = [*self._read()] if path.exists() else []

    def add(self, skip: SkippedBatch) -> None:
        """Record ``skip`` durably; a kill leaves it whole or not at all."""
        self.entries.append(skip)
        with atomic_write(self.path) as file:
            file.writelines(json.dumps(asdict(entry)).encode() + b"\n" for entry in self.entries)

    def _read(self) -> Iterator[SkippedBatch]:
        for number, line in enumerate(self.path.read_bytes().splitlines(), 1):
            try:
                fields = json.loads(line)
                yield SkippedBatch(**fields | {"images": tuple(fields["images"])})
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"{self.path}, line {number}, cannot be read: {error!r}. It tells which "
                    f"batches were left out; "
                    f"without the line they will be found again"
                ) from None
