"""A report that is written as it is found out: Markdown with tables and pictures, and its numbers
as JSON.
"""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from sturdy.sampling.grids import save_png


class Report:
    """``report.md`` and ``report.json`` in ``directory``, and the pictures beside them.

    Attributes:
        numbers: all that was measured, as primitives.
    """

    def __init__(self, directory: Path, title: str) -> None:
        self.directory, self.blocks = directory, [f"# {title}"]
        self.numbers: dict[str, Any] = {}

    def heading(self, text: str) -> None:
        self.blocks.append(f"## {text}")

    def text(self, text: str) -> None:
        self.blocks.append(text)

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str | float]]) -> str:
        """Add a table and return its text, whose columns are aligned also without being
        rendered.
        """
        cells = [[_cell(value) for value in row] for row in (head, *rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
        cells.insert(1, ["-" * width for width in widths])
        lines = [
            f"| {' | '.join(c.ljust(w) for c, w in zip(row, widths, strict=True))} |"
            for row in cells
        ]
        self.blocks.append("\n".join(lines))
        return self.blocks[-1]

    def picture(self, name: str, image: Image.Image, caption: str) -> None:
        """Save ``image`` as ``name`` beside the report and show it."""
        save_png(image, self.directory / name)
        self.blocks.append(f"![{caption}]({name})\n\n*{caption}*")

    def write(self) -> Path:
        """Both files, each whole or not at all; the path of the Markdown."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for name, text in (
            ("report.json", json.dumps(_finite(self.numbers), indent=1) + "\n"),
            ("report.md", "\n\n".join(self.blocks) + "\n"),
        ):
            aside = self.directory / f".{name}.{os.getpid()}"  # another process may write the same
            aside.write_text(text)
            os.replace(aside, self.directory / name)
        return self.directory / "report.md"


def percent(share: float) -> str:
    """``"12.3 %"``; a dash for what is not known."""
    return "–" if math.isnan(share) else f"{100 * share:.1f} %"


def _cell(value: str | float) -> str:
    if isinstance(value, str):
        return value.replace("|", "\\|")
    return f"{value:.4g}"


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
