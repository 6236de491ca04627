"""``metrics.csv``, the record of a run: one row per step and one per validation.

Rows are appended. When a run is resumed at a step, the rows after it are cut off, as they will come
again. Every other logger can be filled from this file.
"""

import csv
import io
import math
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import Logger
from numpy.typing import NDArray
from typing_extensions import override

from exact_resume.files import atomic_write, fsync

Array = NDArray[np.float64]


class MetricsCSV(Logger):
    """A table of rows ``step, name, name, ...``.

    An empty cell is a metric that the row does not have.

    Args:
        path: the file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.columns = self._read_columns()

    @property
    @override
    def name(self) -> str:
        return "metrics.csv"

    @property
    @override
    def version(self) -> str:
        return ""

    @override
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass  # they are in ``attempts/``

    @override
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append one row; a metric that is new adds a column.

        Rows come from the callback ``Record``. Those that Lightning logs by itself have an
        ``epoch`` and are ignored: they number the steps in another way.
        """
        if "epoch" in metrics:
            return
        row = _format_row(metrics, step)
        new = [name for name in row if name not in self.columns]
        if new:
            rows = self.rows()
            self.columns += new
            self._rewrite(rows)
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(row)

    def replace(self, metrics: Mapping[str, float], step: int, *, same: Sequence[str] = ()) -> None:
        """Write one row in the place of the rows of ``step`` with equal values of ``same``.

        The file is written completely or not at all, with its rows in the order of steps.

        Args:
            metrics: values by name.
            step: of the row.
            same: columns that tell rows of one step apart.
        """
        new = _format_row(metrics, step)
        identity = [new.get(name, "") for name in ("step", *same)]
        rows = []
        for row in self.rows():
            if [row.get(name) or "" for name in ("step", *same)] != identity:
                rows.append(row)
        rows.append(new)  # the newest of a step is its last one
        self.columns += [name for name in new if name not in self.columns]
        self._rewrite(sorted(rows, key=_step))

    def reload(self) -> None:
        """Read the columns again, after another file was put in the place of this one."""
        self.columns = self._read_columns()

    def rows(self) -> list[dict[str, str]]:
        """Return all rows, as text; see ``read_rows``."""
        return read_rows(self.path)

    def column(self, name: str) -> dict[int, float]:
        """Return the metric ``name`` by step."""
        return _numbers(self.rows(), name)

    def cut(self, step: int) -> list[dict[str, str]]:
        """Drop the rows after ``step``, and return them."""
        rows = self.rows()
        if self.path.exists():
            self._rewrite([row for row in rows if _step(row) <= step])
        return [row for row in rows if _step(row) > step]

    def sync(self) -> None:
        """Make the written rows durable."""
        if self.path.exists():
            with self.path.open("a") as file:
                fsync(file.fileno())

    def _read_columns(self) -> list[str]:
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            return next(csv.reader(file), [])

    def _rewrite(self, rows: Iterable[Mapping[str, str]]) -> None:
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, self.columns)
        writer.writeheader()
        writer.writerows(rows)
        with atomic_write(self.path) as file:
            file.write(table.getvalue().encode())


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a record as text, in their order; none if there is no file.

    A last line that a kill has cut is left out.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a table of text.
    """
    with _csv_errors(path):
        rows = list(csv.DictReader(_complete_lines(path)))
    return [row for row in rows if None not in row.values() and row.get("step", "").isdigit()]


def read_column(path: Path, name: str) -> dict[int, float]:
    """Return a column of a record by step; values that are not numbers are left out.

    A file that cannot be read is an empty one: use it for reports about a run, not for the run.
    """
    try:
        return _numbers(read_rows(path), name)
    except (OSError, ValueError):
        return {}


def read_series(path: Path) -> dict[str, tuple[Array, Array]]:
    """Return the steps and the values of each column of a record, for curves.

    Empty cells are left out, and so are empty columns. A cell that is no number is NaN.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a table of text.
    """
    steps: list[array[float]] = []  # by column; arrays, because a record may have a million rows
    values: list[array[float]] = []
    with _csv_errors(path):
        rows = csv.reader(_complete_lines(path))
        names = next(rows, [])
        for _ in names:
            steps.append(array("d"))
            values.append(array("d"))
        if "step" not in names:
            return {}
        place = names.index("step")
        for row in rows:
            if len(row) != len(names) or not row[place].isdigit():
                continue
            step = float(row[place])
            for i, cell in enumerate(row):
                if cell:
                    steps[i].append(step)
                    values[i].append(_number(cell))
    found = {}
    for name, *column in zip(names, steps, values, strict=True):
        if name != "step" and column[0]:
            found[name] = (np.array(column[0]), np.array(column[1]))
    return found


def format_value(value: float) -> str:
    """Return ``value`` with nine digits, from which a float32 is read back exactly."""
    return f"{float(value):.9g}"


def _complete_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a record; none if there is no file, and not the one that a kill cut."""
    if path.exists():
        with path.open(newline="") as file:
            yield from (line for line in file if line.endswith("\n"))


@contextmanager
def _csv_errors(path: Path) -> Iterator[None]:
    """Raise ValueError with the name of the file if it is no table."""
    try:
        yield
    except csv.Error as error:
        raise ValueError(f"{path} is not a CSV file: {error}") from error


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return math.nan


def _format_row(metrics: Mapping[str, float], step: int | None) -> dict[str, str]:
    return {"step": str(step)} | {name: format_value(value) for name, value in metrics.items()}


def _step(row: Mapping[str, str]) -> int:
    return int(row["step"])


def _numbers(rows: Iterable[Mapping[str, str]], name: str) -> dict[int, float]:
    """Return the column ``name`` by step, without cells that are not numbers."""
    found = {}
    for row in rows:
        try:
            found[_step(row)] = float(row.get(name) or "")
        except ValueError:
            continue
    return found
