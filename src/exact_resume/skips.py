"""Batches that were left out because they gave a loss or a gradient that is not finite.

A skip is part of the trajectory. It is stored outside the checkpoints and found by its position,
because the checkpoint that a run rolls back to is older than the skip. Every resume applies all
skips.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from exact_resume.files import atomic_write


@dataclass(frozen=True)
class SkippedBatch:
    """A batch that was left out.

    Attributes:
        step: the step that the batch would have made, as in the record.
        position: global position of its first sample.
        size: number of samples.
        reason: what was not finite.
        images: names of the samples, for people.
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
    """A step gave a number that is not finite.

    Attributes:
        skip: the batch of that step.
    """

    def __init__(self, skip: SkippedBatch) -> None:
        super().__init__(str(skip))
        self.skip = skip


class SkipLog:
    """The skips of one run in the file ``path``, in the order in which they were found.

    Raises:
        ValueError: the file is damaged; the message names the line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries = list(self._read()) if path.exists() else []

    def add(self, skip: SkippedBatch) -> None:
        """Record ``skip`` durably and atomically."""
        self.entries.append(skip)
        lines = [json.dumps(asdict(entry)).encode() + b"\n" for entry in self.entries]
        with atomic_write(self.path) as file:
            file.writelines(lines)

    def _read(self) -> Iterator[SkippedBatch]:
        for number, line in enumerate(self.path.read_bytes().splitlines(), 1):
            try:
                fields = json.loads(line)
                yield SkippedBatch(**fields | {"images": tuple(fields["images"])})
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"{self.path}, line {number}, cannot be read: {error!r}. It says which batches "
                    f"were left out; without the line they will be found again"
                ) from None
