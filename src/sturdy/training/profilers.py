"""Where the time of a run goes: ``trainer.profiler=simple|advanced|pytorch``."""

import logging
import re
import warnings
from pathlib import Path

from lightning.pytorch.profilers import (
    AdvancedProfiler,
    Profiler,
    PyTorchProfiler,
    SimpleProfiler,
)
from typing_extensions import override

log = logging.getLogger(__name__)

ROWS = 15
ROW = "{:<44}{:>8}{:>12}{:>10}{:>6}"


def build_profiler(name: str, folder: Path) -> Profiler:
    """Return a profiler; what does not fit on a screen goes into files of ``folder``.

    Args:
        name: ``"simple"``, a table of the steps' parts; ``"advanced"``, Python's functions;
            ``"pytorch"``, each operation, with a trace for https://ui.perfetto.dev.
        folder: of this start of the run.
    """
    if name == "simple":
        return TableProfiler()
    log.info(f"the profile will be in {folder}")
    if name == "advanced":
        return AdvancedProfiler(dirpath=folder, filename="profile")
    for usual in ("Profiler clears events at the end", "default schedule will be overridden"):
        warnings.filterwarnings("ignore", f"(?s).*{usual}")
    return PyTorchProfiler(dirpath=folder, filename="profile")


class TableProfiler(SimpleProfiler):
    """Lightning's table of actions, as wide as a terminal: the longest of them only."""

    @override
    def summary(self) -> str:
        report, _, seconds = self._make_report_extended()
        lines = ["where the time went", ROW.format("", "calls", "ms a call", "s", "%")]
        for action, mean, calls, total, percent in report[:ROWS]:
            row = (f"{calls}", f"{mean * 1e3:.1f}", f"{total:.2f}", f"{percent:.0f}")
            lines.append(ROW.format(_shorten(action), *row))
        lines.append(f"of {seconds:.1f} s. An action may contain others, so the sum is more")
        return "\n".join(lines) + "\n"


def _shorten(action: str) -> str:
    """Return the name of an action without its kind and without the state of a callback."""
    plain = re.sub(r"^\[[^]]*\]|\{.*\}", "", action)
    return plain if len(plain) <= 43 else f"...{plain[-40:]}"
