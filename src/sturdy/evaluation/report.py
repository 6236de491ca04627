"""A report in Markdown, with tables and images, and its numbers as JSON."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from exact_resume.files import atomic_write
from sturdy.sampling.grids import save_png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150


class Report:
    """``report.md`` and ``report.json`` in ``directory``, and the images beside them.

    Args:
        directory: is made if it does not exist.
        title: of the report.

    Attributes:
        introduction: a paragraph below the title.
        verdicts: the most important results, a line each; they follow the introduction.
        blocks: the sections, in Markdown.
        numbers: all results, as primitives.
    """

    def __init__(self, directory: Path, title: str) -> None:
        self.directory = directory
        self.title = title
        self.introduction = ""
        self.verdicts: list[str] = []
        self.blocks: list[str] = []
        self.numbers: dict[str, Any] = {}

    def heading(self, text: str) -> None:
        """Begin a section."""
        self.blocks.append(f"## {text}")

    def text(self, text: str) -> None:
        """Add a paragraph."""
        self.blocks.append(text)

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str | float]]) -> str:
        """Add a table; return its text, whose columns are aligned as plain text, too."""
        cells = [[_cell(value) for value in row] for row in (head, *rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
        cells.insert(1, ["-" * width for width in widths])
        lines = []
        for row in cells:
            padded = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
            lines.append(f"| {' | '.join(padded)} |")
        self.blocks.append("\n".join(lines))
        return self.blocks[-1]

    def image(self, name: str, image: Image.Image, caption: str) -> None:
        """Save ``image`` as ``name`` beside the report, and show it."""
        save_png(image, self.directory / name)
        self.blocks.append(f"![{caption}]({name})\n\n*{caption}*")

    def figure(self, name: str, figure: "Figure", caption: str) -> None:
        """Save a matplotlib ``figure`` as ``name`` beside the report, and show it."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.directory / name, durable=False, unique=True) as file:
            figure.savefig(file, format="png", dpi=DPI, bbox_inches="tight")
        self.blocks.append(f"![{caption}]({name})\n\n*{caption}*")

    def write(self) -> Path:
        """Write both files, each completely or not at all; return the path of ``report.md``."""
        self.directory.mkdir(parents=True, exist_ok=True)
        verdicts = "\n".join(f"- {line}" for line in self.verdicts)
        blocks = [f"# {self.title}", self.introduction, verdicts, *self.blocks]
        text = "\n\n".join(block for block in blocks if block)
        write_json(self.directory / "report.json", self.numbers)
        path = self.directory / "report.md"
        with atomic_write(path, durable=False, unique=True) as file:
            file.write(f"{text}\n".encode())
        return path


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON, completely or not at all; NaN and infinity become null."""
    with atomic_write(path, durable=False, unique=True) as file:
        file.write(f"{json.dumps(_finite(value), indent=1)}\n".encode())


def percent(share: float) -> str:
    """Format a share as ``"12.3 %"``; NaN as a dash."""
    return "–" if math.isnan(share) else f"{100 * share:.1f} %"


def _cell(value: str | float) -> str:
    if isinstance(value, str):
        return value.replace("|", "\\|")
    return f"{value:.4g}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
