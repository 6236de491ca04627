"""What the cluster tests struck, and how it went.

The tests add a JSON object to each line of the file that the environment variable CLUSTER_RECORD
names. ``python tests/cluster/record.py FILE`` prints it as a table for the documentation.
"""

import json
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

COLUMNS = (
    "Fault",
    "times",
    "seconds until the next step, median (longest)",
    "steps trained again, median (most)",
    "saved steps lost",
    "bits",
)


@dataclass
class Strike:
    """One fault in a run, and its end.

    Attributes:
        fault: in words, the same for all of its kind.
        seconds: from the strike until a new step was trained.
        again: the steps that were trained a second time, since they were not saved.
        lost: the steps that were saved, and had to be trained again nevertheless.
    """

    fault: str
    seconds: float
    again: int
    lost: int


def record(strikes: Iterable[Strike], *, equal: bool) -> None:
    """Add the strikes of one run to the file, and whether its bits are those of a run without."""
    lines = [json.dumps(asdict(strike) | {"equal": equal}) + "\n" for strike in strikes]
    print("".join(lines))
    if path := os.environ.get("CLUSTER_RECORD"):
        with Path(path).open("a") as file:
            file.writelines(lines)


def table(path: Path) -> str:
    """Return the table as Markdown, one line for each kind of fault."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for fault in dict.fromkeys(row["fault"] for row in rows):
        alike = [row for row in rows if row["fault"] == fault]
        seconds = [row["seconds"] for row in alike]
        again = [row["again"] for row in alike]
        cells = [
            fault,
            str(len(alike)),
            f"{median(seconds):.0f} ({max(seconds):.0f})",
            f"{median(again):.0f} ({max(again)})",
            str(sum(row["lost"] for row in alike)),
            "equal" if all(row["equal"] for row in alike) else "DIFFERENT",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(Path(sys.argv[1])))
