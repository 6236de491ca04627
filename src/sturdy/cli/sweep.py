"""A sweep: each combination of the values given is a run of its own, named after what is swept.

Each job is a process of its own, started by the very command that one could type. So its bits are
those of the run
alone, by construction: threads, flags, handlers and locks of the job before it are gone with its
    process.
"""

import csv
import itertools
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, stdev
from types import FrameType

from hydra.core.override_parser.types import Override, Quote, QuotedString, Transformer

from exact_resume.signals import EXIT_INTERRUPTED, EXIT_RESUMABLE, SIGNALS
from exact_resume.supervisor import signal_when_parent_dies
from sturdy.cli.overrides import (
    LAUNCHER,
    UsageError,
    check_composed,
    check_option,
    compose_checked,
    hydra_as_usage_error,
    parse_overrides,
)

# by exit code, the worst first: what was cut off, what a person must mend, what goes on by itself
OUTCOMES = {
    EXIT_INTERRUPTED: "stopped at once",
    2: "refused",
    1: "failed",
    EXIT_RESUMABLE: "stopped, and saved",
    0: "finished",
    None: "not started",
}
LONGEST = 120  # characters of a name; a file system takes 255 bytes


@dataclass(frozen=True)
class Job:
    """One run of a sweep.

    Attributes:
        name: of the run, ``cars/optimizer.lr-0.001+seed-0``.
        words: the overrides that make the command; with the name, if the script knows names.
        record: its ``metrics.csv``, once it is a run.
    """

    name: str
    words: list[str]
    record: Path | None = None


def plan(config: Path, words: list[str]) -> list[Job]:
    """The jobs of a sweep, each of them checked."""
    with hydra_as_usage_error(config):
        overrides = parse_overrides(words, multirun=True)
        for override in overrides:
            if override.key_or_group == LAUNCHER[0]:
                check_option(override)
                if not str(override.value()).startswith("basic") and not find_spec("submitit"):
                    raise UsageError(
                        f"{override.input_line} needs submitit: pip install "
                        f"'sturdy-diffusion[slurm]'"
                    )
        found = combinations(overrides)
    jobs = []
    for label, combination in found:
        try:
            cfg = compose_checked(config, combination)
            check_composed(cfg)
        except UsageError as mistake:
            raise UsageError(f"{label}: {mistake}" if label else str(mistake)) from None
        if "name" not in cfg:
            jobs.append(Job(label, combination))
            continue
        name = f"{cfg.name}/{label}".rstrip("/")
        own = [*combination, f"name={QuotedString(name, Quote.single).with_quotes()}"]
        jobs.append(Job(name, own, Path(cfg.paths.runs) / name / "metrics.csv"))
    if not jobs:
        raise UsageError(f"{' '.join(words)}: no values to sweep through")
    return jobs


def combinations(overrides: Iterable[Override]) -> list[tuple[str, list[str]]]:
    """The words of each combination, and a label of what is swept in it.

    Raises:
        ValueError: for what has no values to go through, such as an interval.
    """
    last = {
        override.get_key_element(): override for override in overrides
    }  # of a repeated key the last word holds
    ways = [_ways(key, override) for key, override in last.items() if not key.startswith(LAUNCHER)]
    found: dict[
        tuple[str, ...], tuple[str, list[str]]
    ] = {}  # by the values, of which one may be given twice
    for combination in itertools.product(*ways):
        swept = {key: value for _, key, value in combination if value is not None}
        found.setdefault(
            tuple(swept.values()), (label(swept), [word for word, _, _ in combination])
        )
    return list(found.values())


def label(swept: dict[str, str]) -> str:
    """A directory's name: it depends on the keys and their values, and not on their order or on the
    other values.

    It needs quotes neither in a shell nor in Hydra. Where that takes characters away, a digest of
    all tells apart.
    """
    items = sorted((key.lstrip("+"), value) for key, value in swept.items() if key != "name")
    fit = "+".join(f"{_fit(key)}-{_fit(value)}" for key, value in items)
    if len(fit) <= LONGEST and all(_fit(part) == part for item in items for part in item):
        return fit
    return f"{fit[:LONGEST]}-{blake2b(repr(items).encode(), digest_size=4).hexdigest()}"


def _fit(text: str) -> str:
    fit = re.sub(r"[^A-Za-z0-9._-]+", "-", text)
    return text if fit == text else fit.strip("-")


def _ways(key: str, override: Override) -> list[tuple[str, str, str | None]]:
    """(word, key, value) for each value of ``override``; None for the value of what is not
    swept.
    """
    if not override.is_sweep_override():
        return [(override.input_line or "", key, None)]
    if not override.is_discrete_sweep():
        raise ValueError(
            f"{override.input_line}: a sweep goes through values; give them, as in {key}=1,2,3"
        )
    values = list(override.sweep_iterator())  # once, as it may shuffle
    texts = [
        value.text if isinstance(value, QuotedString) else Transformer.str(value)
        for value in values
    ]
    return [
        (f"{key}={Transformer.str(value)}", key, text)
        for value, text in zip(values, texts, strict=True)
    ]


class Child:
    """Runs a job as a child and tells it each signal that this process hears, once.

    The child has a process group of its own: else Ctrl-C in a terminal would reach it twice, which
        means "at once".

    Attributes:
        heard: the last signal; None while there was none.
    """

    def __init__(self) -> None:
        self.heard: int | None = None
        self.process: subprocess.Popen[bytes] | None = None
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._tell)

    def run(self, command: Sequence[str]) -> int | None:
        """Its exit code, 1 where that is none of ours; None if a signal was heard before it
        began.
        """
        before = signal.pthread_sigmask(
            signal.SIG_BLOCK, SIGNALS
        )  # a signal waits until there is somebody to tell
        try:
            if self.heard:
                return None
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, process_group=0, preexec_fn=_in_the_child(before)
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        code = self.process.wait()
        if code < 0 and -code == self.heard:
            return EXIT_RESUMABLE  # so early that nothing listened yet
        if code not in OUTCOMES:
            why = (
                f"was killed by {signal.Signals(-code).name}"
                if code < 0
                else f"ended with exit code {code}"
            )
            say(f"the job {why}")
            return 1
        return code

    def _tell(self, number: int, frame: FrameType | None) -> None:
        self.heard = number
        if self.process:
            self.process.send_signal(number)


def _in_the_child(mask: set[int | signal.Signals]) -> Callable[[], None]:
    def prepare() -> None:
        signal_when_parent_dies(
            signal.SIGTERM
        )  # a job does not outlive its sweep: it saves and leaves
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    return prepare


def sweep(script: str, jobs: Sequence[Job]) -> int:
    """Run the jobs here, one after the other; returns the worst exit code.

    What fails or is refused does not stop the others; a signal does.
    """
    child, outcomes = Child(), dict.fromkeys((job.name for job in jobs), None)
    for number, job in enumerate(jobs, 1):
        say(f"job {number} of {len(jobs)}: {job.name}")
        outcomes[job.name] = child.run([sys.executable, script, *job.words])
        if child.heard or outcomes[job.name] in (EXIT_RESUMABLE, EXIT_INTERRUPTED):
            break
    return report(outcomes, jobs)


def report(outcomes: Mapping[str, int | None], jobs: Sequence[Job] = ()) -> int:
    """Print how each job ended and how good it became, and why the exit code is what it is, which
    it returns.
    """
    say(f"sweep of {len(outcomes)}:")
    width, longest = (
        max(len(name) for name in outcomes),
        max(len(outcome) for outcome in OUTCOMES.values()),
    )
    scores = {job.name: score for job in jobs if (score := best(job.record))}
    for name, code in outcomes.items():
        told = ""
        if name in scores:
            told = f"{'':{longest - len(OUTCOMES[code])}}  best val/loss {scores[name][0]:.4f} at step {scores[name][1]}"
        say(f"    {name:{width}}  {OUTCOMES[code]}{told}")
    known = [loss for loss, _ in scores.values()]
    if len(known) > 1:
        say(
            f"best val/loss of {len(known)}: mean {mean(known):.4f}, standard deviation "
            f"{stdev(known):.4f}"
        )
    codes = {EXIT_RESUMABLE if code is None else code for code in outcomes.values()}
    worst = next(code for code in OUTCOMES if code in codes)
    assert worst is not None
    if worst:
        say(
            f"exit code {worst}: the worst is {OUTCOMES[worst]}; the same command takes up what is "
            f"not finished"
        )
    return worst


def best(record: Path | None) -> tuple[float, int] | None:
    """The least ``val/loss`` of a run and its step; None while there is none."""
    if not record or not record.exists():
        return None
    with record.open(newline="") as file:
        rows = [
            (row["val/loss"], row["step"]) for row in csv.DictReader(file) if row.get("val/loss")
        ]
    return min((float(loss), int(step)) for loss, step in rows) if rows else None


def say(line: str) -> None:
    """Print ``line``; a terminal that is gone is no reason to end otherwise."""
    with suppress(OSError):
        print(line, flush=True)
