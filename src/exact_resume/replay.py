"""What every mirror of ``metrics.csv`` does: it is filled up from the file when a run starts, then
gets row by row.

all rows of a step, and its pictures  ->  one ``write``
"""

import csv
import logging
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from exact_resume.metrics import MetricsCSV

log = logging.getLogger(__name__)

EVALUATIONS = "evaluations.csv"  # in the run's directory


class ReplayLogger(Logger):
    """A logger that holds the rows of ``metrics.csv``, each once, whatever was killed before.

    A step is written when the next one begins or the run is finished: an interrupted run may have
        something to add to
    its last step, such as a validation, and the refill of the next start writes that step whole. A
    mirror that fails is given up until then with a warning, for it must not cost a checkpoint.
    """

    def __init__(self) -> None:
        super().__init__()
        self.config: dict[str, Any] = {}
        self.works = self.live = True
        self.step: int | None = None
        self.values: dict[str, float] = {}
        self.pictures: dict[int, dict[str, list[str]]] = {}

    @property
    def name(self) -> str:
        return type(self).__name__.lower()

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Keep the resolved config, for ``start``."""
        self.config = dict(params)

    def refill(self, rows: Iterable[Mapping[str, str]], pictures: Mapping[int, Path]) -> None:
        """Start, with what the run has recorded so far.

        Args:
            rows: of ``metrics.csv``, up to the step at which the run is entered.
            pictures: the grids of samples by step; one of a later step is written when that step
                comes.
        """
        with self._spared():
            self.start()
        self.pictures = {step: {"samples": [str(path)]} for step, path in pictures.items()}
        for row in rows:
            self.log_metrics(
                {k: float(v) for k, v in row.items() if k != "step" and v}, int(row["step"])
            )
        if self.works:
            with self._spared():
                self.refilled()

    def show(
        self, rows: Iterable[Mapping[str, str]], pictures: Mapping[int, Path], *, finished: bool
    ) -> bool:
        """Be filled up with all there is while nobody trains; arguments as of ``refill``, returns
        whether it worked.

        Args:
            finished: the run is over, and not merely interrupted.
        """
        self.live = False
        self.refill(rows, pictures)
        self._write()
        if self.works:
            with self._spared():
                self.close(finished)
        return self.works

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Take one row; steps come in order."""
        if step != self.step:
            self._write()
            self.step = step
        self.values |= metrics

    def log_image(self, key: str, images: list[str], step: int | None = None) -> None:
        """Take the image files ``images`` of ``step``, before or after its row."""
        if step is not None:
            self.pictures.setdefault(step, {})[key] = [str(path) for path in images]

    def finalize(self, status: str) -> None:
        finished = status == "success"
        if finished:
            self._write()
        if self.works:
            with self._spared():
                self.close(finished)

    def _write(self) -> None:
        if self.step is not None and self.works:
            with self._spared():
                self.write(self.step, self.values, self.pictures.pop(self.step, {}))
        self.step, self.values = None, {}

    @contextmanager
    def _spared(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.works = False
            log.warning(
                f"{self.name} is given up, and filled up at the next start: "
                f"{type(error).__name__}: {error}"
            )

    @abstractmethod
    def start(self) -> None:
        """Begin an empty mirror beside that of the start before."""

    def refilled(self) -> None:
        """The new mirror now has what the old one had."""

    @abstractmethod
    def write(
        self, step: int, values: Mapping[str, float], pictures: Mapping[str, list[str]]
    ) -> None:
        """Write all there is of one step."""

    @abstractmethod
    def close(self, finished: bool) -> None:
        """The run is over, ``finished`` or interrupted; maybe it never started."""


def recorded_rows(
    run: Path, last: int | None = None
) -> tuple[list[dict[str, str]], dict[int, Path]]:
    """What a mirror shows of the directory ``run``, up to the step ``last``: rows in order, and
    pictures by step.
    """
    rows = [*MetricsCSV(run / "metrics.csv").rows(), *_evaluations(run)]
    rows = sorted(
        (row for row in rows if last is None or int(row["step"]) <= last),
        key=lambda row: int(row["step"]),
    )
    return rows, {int(path.stem[5:]): path for path in run.glob("samples/step-*.png")}


def _evaluations(run: Path) -> list[dict[str, str]]:
    try:
        rows = MetricsCSV(run / EVALUATIONS).rows()
        _ = [float(value) for row in rows for value in row.values() if value]
    except (OSError, TypeError, ValueError, csv.Error) as error:  # somebody may have edited it
        log.warning(
            f"{run / EVALUATIONS} cannot be read, so no logger shows it ({error}): mend or delete "
            f"it"
        )
        return []
    return rows
