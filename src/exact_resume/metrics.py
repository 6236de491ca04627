"""``metrics.csv``, the record of a run: one row per step and one per validation.

It is append-only but for one thing: when a run is entered at a step, the rows after it are cut off,
for they will come again. Every other logger is a mirror that can be filled up from it.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from exact_resume.files import atomic_write, fsync


class MetricsCSV(Logger):
    """Rows ``step, name, name, ...`` in ``path``; an empty cell is a metric that this row does not
    have.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.columns = self._read_columns()

    @property
    def name(self) -> str:
        return "metrics.csv"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Hyper-parameters are in ``attempts/``."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append one row; a metric that is new widens the table."""
        row = {"step": str(step)} | {k: format_value(v) for k, v in metrics.items() if k != "epoch"}
        if new := [k for k in row if k not in self.columns]:
            rows = self.rows()
            self.columns += new
            self._rewrite(rows)
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(row)

    def replace(self, metrics: Mapping[str, float], step: int, *, same: Sequence[str] = ()) -> None:
        """Make this the last row of ``step``, in the place of those with the same values of the
        columns ``same``.

        The file is written whole or not at all.
        """
        new = {"step": str(step)} | {k: format_value(v) for k, v in metrics.items()}
        key = [new.get(k, "") for k in ("step", *same)]
        others = [row for row in self.rows() if [row.get(k) or "" for k in ("step", *same)] != key]
        self.columns += [k for k in new if k not in self.columns]
        self._rewrite(sorted([*others, new], key=lambda row: int(row["step"])))

    def rows(self) -> list[dict[str, str]]:
        """All rows, as text; a last line that a kill cut short is left out."""
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            lines = [line for line in file if line.endswith("\n")]
        return [
            row
            for row in csv.DictReader(lines)
            if None not in row.values() and row.get("step", "").isdigit()
        ]

    def column(self, name: str) -> dict[int, float]:
        """The metric ``name`` by step."""
        return {int(row["step"]): float(row[name]) for row in self.rows() if row.get(name)}

    def cut(self, step: int) -> list[dict[str, str]]:
        """Drop the rows after ``step``; returns them."""
        rows = self.rows()
        after = [row for row in rows if int(row["step"]) > step]
        if self.path.exists():
            self._rewrite([row for row in rows if int(row["step"]) <= step])
        return after

    def sync(self) -> None:
        """Make what was written durable."""
        if self.path.exists():
            with self.path.open("a") as file:
                fsync(file.fileno())

    def _read_columns(self) -> list[str]:
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            return next(csv.reader(file), [])

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, self.columns)
        writer.writeheader()
        writer.writerows(rows)
        with atomic_write(self.path) as file:
            file.write(table.getvalue().encode())


def format_value(value: float) -> str:
    """``value`` as it is written: with nine digits, which give a float32 back exactly."""
    return f"{float(value):.9g}"


def read_column(path: Path, name: str) -> dict[int, float]:
    """Return a column of a record by step; values that are not numbers are left out."""
    try:
        with path.open(newline="") as file:
            lines = [line for line in file if line.endswith("\n")]  # a kill may cut the last one
        rows = list(csv.DictReader(lines))
    except (OSError, ValueError, csv.Error):
        return {}
    found = {}
    for row in rows:
        try:
            found[int(row["step"])] = float(row[name])
        except (KeyError, TypeError, ValueError):
            continue
    return found
