"""What is known about a run, from the files in its directory; nothing is changed."""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from exact_resume.attempt import ENVIRONMENT, START
from exact_resume.checkpoint.store import CorruptCheckpointError, NoValidCheckpointError, Store
from exact_resume.metrics import Array, read_rows, read_series
from exact_resume.replay import EVALUATIONS
from exact_resume.resume import DEFAULT_MONITOR
from exact_resume.skips import SkipLog
from exact_resume.status import describe_resume, describe_set_aside, size_on_disk, verify_all

RATE = "train/images_per_second"  # of the record
RECENT = 20  # values of it that say how fast the run is now


@dataclass(frozen=True)
class Start:
    """One attempt.

    Attributes:
        number: ``1`` for ``attempts/001``.
        time: when it started, for people.
        host: where.
        step: at which the run was entered; None if an older version did not store it.
        guarantee: ``fresh``, ``bitwise``, ``same samples`` or ``refused``; "" if it is not stored.
        banner: as it was printed.
        data: lines about its data.
        max_steps: at which the run was to be finished.
    """

    number: int
    time: str
    host: str
    step: int | None
    guarantee: str
    banner: str
    data: list[str]
    max_steps: int | None


@dataclass(frozen=True)
class SavedStep:
    """A checkpoint of the run.

    Attributes:
        step: optimizer steps done.
        time: when it was written, in seconds since 1970; None if that cannot be read.
        size: in bytes.
        score: its monitored metric; None without.
        marks: ``last`` and ``best``.
        problem: why it does not verify; "" if nothing is known against it.
    """

    step: int
    time: float | None
    size: int
    score: float | None
    marks: list[str]
    problem: str


@dataclass
class RunRecord:
    """Everything that the page shows.

    Attributes:
        home: the run's directory.
        series: steps and values of each metric.
        starts: all attempts, the oldest first.
        saved: the checkpoints, the newest first.
        is_verified: whether every byte of them was read and compared.
        set_aside: lines about checkpoints that are no longer among them.
        skips: batches that were left out: step, position, size, reason and names.
        pictures: files by step, from ``samples/``.
        evaluations: rows of ``evaluations.csv``.
        monitor: the metric that says which checkpoint is best.
        scores: that metric by step, the finite ones.
        best: the step of the best of all scores; None without.
        step: the newest step that is recorded or saved.
        max_steps: where the run is finished; None if that is not stored.
        seconds_left: of training, without validation and saves; None if that is not known.
        outlook: what the same command would do now; "" if nobody asked.
        problems: files that could not be read, a line each.
    """

    home: Path
    series: dict[str, tuple[Array, Array]] = field(default_factory=dict)
    starts: list[Start] = field(default_factory=list)
    saved: list[SavedStep] = field(default_factory=list)
    is_verified: bool = False
    set_aside: list[str] = field(default_factory=list)
    skips: list[dict[str, Any]] = field(default_factory=list)
    pictures: dict[int, Path] = field(default_factory=dict)
    evaluations: list[dict[str, str]] = field(default_factory=list)
    monitor: str = ""
    scores: dict[int, float] = field(default_factory=dict)
    best: int | None = None
    step: int = 0
    max_steps: int | None = None
    seconds_left: float | None = None
    outlook: str = ""
    problems: list[str] = field(default_factory=list)

    @property
    def is_finished(self) -> bool:
        """Whether a checkpoint of the last step is there."""
        return bool(self.max_steps and self.saved and self.saved[0].step >= self.max_steps)

    def entries(self) -> list[Start]:
        """Return the starts that entered what the run is now.

        A later start at an older step has put away what an earlier one trained after that step.
        """
        kept: list[Start] = []
        for start in self.starts:
            if start.step is not None:
                kept = [earlier for earlier in kept if (earlier.step or 0) <= start.step]
                kept.append(start)
        return kept


def is_run(home: Path) -> bool:
    """Return whether ``home`` holds anything of a run."""
    names = ("metrics.csv", "attempts", "checkpoints")
    return any((home / name).exists() for name in names)


def read_run(home: Path, *, verify: bool = False) -> RunRecord:
    """Read what is known about the run in ``home``.

    Args:
        home: its directory.
        verify: read every byte of its checkpoints, and compare; else only their manifests.
    """
    run = RunRecord(home)
    store = Store(home / "checkpoints")
    manifests, corrupt = verify_all(store) if verify else _read_manifests(store)
    run.is_verified = verify
    newest = manifests[max(manifests)] if manifests else {}
    config = newest.get("fingerprint", {}).get("config", {})
    run.set_aside = describe_set_aside(home)
    run.starts = _read_starts(home)
    paths = home.glob("samples/step-*.png")
    run.pictures = {int(p.stem[5:]): p for p in sorted(paths) if p.stem[5:].isdigit()}
    try:
        run.series = read_series(home / "metrics.csv")
    except (OSError, ValueError) as error:
        run.problems.append(f"metrics.csv cannot be read: {error}")
    run.monitor = config.get("callbacks.checkpoint.monitor") or DEFAULT_MONITOR
    steps, values = run.series.get(run.monitor, ((), ()))
    scores = dict(zip(map(int, steps), map(float, values), strict=True))
    scores |= store.scores(run.monitor)
    run.scores = {step: score for step, score in scores.items() if math.isfinite(score)}
    sign = -1 if config.get("callbacks.checkpoint.mode") == "max" else 1
    run.best = min(run.scores, key=lambda step: sign * run.scores[step], default=None)
    run.saved = _saved_steps(store, manifests, corrupt, run.scores, sign)
    try:
        run.skips = [vars(skip) for skip in SkipLog(home / "skips.jsonl").entries]
    except (OSError, ValueError) as error:
        run.problems.append(f"skips.jsonl cannot be read: {error}")
    try:
        run.evaluations = read_rows(home / EVALUATIONS)
    except (OSError, ValueError) as error:
        run.problems.append(f"{EVALUATIONS} cannot be read: {error}")
    recorded = [int(steps.max()) for steps, _ in run.series.values()]
    run.step = max([*recorded, *manifests], default=0)
    run.max_steps = _find_max_steps(run.starts, config)
    run.seconds_left = _estimate_seconds(run, config.get("data.batch_size"))
    if verify and manifests:
        run.outlook = describe_resume(max(manifests), newest)
    return run


def _read_manifests(store: Store) -> tuple[dict[int, dict[str, Any]], dict[int, str]]:
    """Return as ``verify_all``, without reading what the manifests describe."""
    valid = {}
    corrupt = {}
    for step in store.steps():
        try:
            valid[step] = store.manifest(step)
        except (CorruptCheckpointError, NoValidCheckpointError, OSError) as reason:
            if store.path(step).exists():
                corrupt[step] = str(reason)
    return valid, corrupt


def _saved_steps(
    store: Store,
    manifests: Mapping[int, Mapping[str, Any]],
    corrupt: Mapping[int, str],
    scores: Mapping[int, float],
    sign: int,
) -> list[SavedStep]:
    best = min(manifests.keys() & scores.keys(), key=lambda s: sign * scores[s], default=None)
    marked = {"last": max(manifests, default=None), "best": best}
    found = []
    for step in sorted(manifests.keys() | corrupt.keys(), reverse=True):
        marks = [mark for mark, of in marked.items() if of == step]
        written = manifests.get(step, {}).get("time")
        size = size_on_disk(store.path(step))
        problem = corrupt.get(step, "")
        found.append(SavedStep(step, written, size, scores.get(step), marks, problem))
    return found


def _read_starts(home: Path) -> list[Start]:
    found = []
    for folder in sorted((home / "attempts").glob("[0-9]*"), key=lambda path: path.name.zfill(9)):
        if not folder.name.isdigit():
            continue
        environment = _read_json(folder / ENVIRONMENT)
        start = _read_json(folder / START)
        step = start.get("step")
        max_steps = start.get("max_steps")
        lines = start.get("data")
        found.append(
            Start(
                int(folder.name),
                str(environment.get("start", "")),
                str(environment.get("host", "")),
                step if isinstance(step, int) else None,
                str(start.get("guarantee", "")),
                str(start.get("banner", "")),
                [str(line) for line in lines] if isinstance(lines, list) else [],
                max_steps if isinstance(max_steps, int) else None,
            )
        )
    return found


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in a file; empty if there is none."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _find_max_steps(starts: list[Start], config: Mapping[str, Any]) -> int | None:
    newest = starts[-1].max_steps if starts else None
    found = newest or config.get("trainer.max_steps")
    return found if isinstance(found, int) and found > 0 else None


def _estimate_seconds(run: RunRecord, batch_size: Any) -> float | None:
    """Return how long the remaining steps take at the speed of the newest ones."""
    if run.max_steps is None or not isinstance(batch_size, int) or RATE not in run.series:
        return None
    rate = float(np.median(run.series[RATE][1][-RECENT:]))
    if not (rate > 0 and math.isfinite(rate)):
        return None
    return max(0, run.max_steps - run.step) * batch_size / rate


def format_time(seconds: float | None) -> str:
    """Return a time since 1970 as local date and time; "" for None."""
    if seconds is None:
        return ""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
