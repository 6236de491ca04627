"""Loggers that hold the rows of ``metrics.csv``.

Each is filled from the file when a run starts, and then gets row by row. All rows of a step and its
images are written together.
"""

import logging
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from typing_extensions import override

from exact_resume.metrics import read_rows

log = logging.getLogger(__name__)

EVALUATIONS = "evaluations.csv"  # in the run's directory


class ReplayLogger(Logger):
    """A logger that holds each row of ``metrics.csv`` once, whatever was killed before.

    A step is written when the next step begins, or when the run is finished. An interrupted run may
    have something to add to its last step, such as a validation; the next start writes that step.
    A logger that fails is not used until then, with a warning, as it must not cost a checkpoint.

    Attributes:
        config: the resolved config of the run.
        healthy: whether nothing has failed yet.
    """

    def __init__(self) -> None:
        super().__init__()
        self.config: dict[str, Any] = {}
        self.healthy = True
        self.step: int | None = None  # not written yet
        self.values: dict[str, float] = {}  # of that step
        self.images: dict[int, dict[str, list[str]]] = {}  # not written yet, by step and name

    @property
    @override
    def name(self) -> str:
        return type(self).__name__.lower()

    @property
    @override
    def version(self) -> str:
        return ""

    @override
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Keep the resolved config, for ``start``."""
        self.config = dict(params)

    def refill(self, rows: Iterable[Mapping[str, str]], images: Mapping[int, Path]) -> None:
        """Start, and write the rows that the run has recorded so far.

        Args:
            rows: of ``metrics.csv``, up to the step at which the run is resumed.
            images: the grids of samples by step. A grid of a later step is written with that step.
        """
        with self._tolerate_errors():
            self.start()
        self.images = {step: {"samples": [str(path)]} for step, path in images.items()}
        for row in rows:
            values = {name: float(cell) for name, cell in row.items() if name != "step" and cell}
            self.log_metrics(values, int(row["step"]))
        with self._tolerate_errors():
            if self.healthy:
                self.on_refilled()

    @override
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Take one row; rows come in the order of steps."""
        if step != self.step:
            self._write_step()
            self.step = step
        self.values |= metrics

    def log_image(self, key: str, images: list[str], step: int | None = None) -> None:
        """Take image files of ``step``, before or after its row."""
        if step is not None:
            self.images.setdefault(step, {})[key] = [str(path) for path in images]

    @override
    def finalize(self, status: str) -> None:
        finished = status == "success"
        if finished:
            self._write_step()
        with self._tolerate_errors():
            if self.healthy:
                self.close(finished)

    def _write_step(self) -> None:
        with self._tolerate_errors():
            if self.step is not None and self.healthy:
                self.write(self.step, self.values, self.images.pop(self.step, {}))
        self.step = None
        self.values = {}

    @contextmanager
    def _tolerate_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.healthy = False
            log.warning(
                f"{self.name} is given up, and filled up at the next start: "
                f"{type(error).__name__}: {error}"
            )

    @abstractmethod
    def start(self) -> None:
        """Begin an empty log beside the log of the last start."""

    def on_refilled(self) -> None:
        """Remove the log of the last start: the new one now has the same rows."""

    @abstractmethod
    def write(
        self, step: int, values: Mapping[str, float], images: Mapping[str, list[str]]
    ) -> None:
        """Write all values and image files of one step."""

    @abstractmethod
    def close(self, finished: bool) -> None:
        """Close the log of a run that is finished or interrupted, or has never started."""


def recorded_rows(
    run: Path, last: int | None = None
) -> tuple[list[dict[str, str]], dict[int, Path]]:
    """Return the rows and grids that a logger of a run shows.

    Args:
        run: its directory.
        last: leave out the rows of later steps; None for none.

    Returns:
        The rows in the order of steps, and the image files by step.
    """
    rows = [*read_rows(run / "metrics.csv"), *_evaluations(run)]
    if last is not None:
        rows = [row for row in rows if int(row["step"]) <= last]
    rows.sort(key=lambda row: int(row["step"]))
    images = {int(path.stem.removeprefix("step-")): path for path in run.glob("samples/step-*.png")}
    return rows, images


def _evaluations(run: Path) -> list[dict[str, str]]:
    """Return the rows of ``evaluations.csv``; none if it cannot be read."""
    path = run / EVALUATIONS
    try:
        rows = read_rows(path)
        for row in rows:
            for cell in filter(None, row.values()):
                float(cell)
    except (OSError, TypeError, ValueError) as error:
        log.warning(f"{path} cannot be read, so no logger shows it ({error}): mend or delete it")
        return []
    return rows
