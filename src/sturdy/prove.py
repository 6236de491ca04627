"""The proof of the promise, for any config on any machine: once, twice, and once more under
SIGKILL.

    once == twice    the stack is deterministic at all
    once == killed   and resuming loses and changes nothing: every weight, EMA, optimizer tensor and
    logged loss

Real processes, real SIGKILL at random instants, comparison of bits. ``break=order``,
``break=noise`` and ``break=dropout`` take a mechanism away in all three runs: the proof must then
fail, or it would prove nothing.
"""

import csv
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from omegaconf import DictConfig

from exact_resume.system import UnsupportedSystemError, check_system

USAGE = """usage: python prove.py experiment=cars [kills=N] [break=order|noise|dropout]
                       [any override of train.py]
Trains three times, the third time killed N (default 5) times at random instants,
and compares every bit."""
INCONCLUSIVE = """NOT PROVED: all is equal, but no start resumed from a checkpoint. Take more
kills or steps, or a smaller callbacks.checkpoint.every_n_train_steps"""
LOOK, TELL = 0.01, 30.0  # seconds between two looks at a run, and between two lines about it


@dataclass(frozen=True)
class Snapshot:
    """What the files of a run showed ``seconds`` after its process was started.

    Attributes:
        step: the newest in its record; -1 in start-up, while the record is as the process found it.
        saved: whether there is a checkpoint.
    """

    seconds: float
    step: int
    saved: bool


@dataclass
class KillPoint:
    """``seconds`` after ``step`` was recorded, and a checkpoint ``saved``: a moment that each start
    comes by anew.
    """

    step: int
    saved: bool
    seconds: float
    since: float | None = None

    def __call__(self, seen: Snapshot) -> bool:
        """Whether it has come; one in start-up also when that is over sooner."""
        if self.since is None and seen.step >= self.step and seen.saved >= self.saved:
            self.since = seen.seconds
        return self.step < 0 <= seen.step or (
            self.since is not None and seen.seconds - self.since >= self.seconds
        )


@dataclass
class Run:
    """One of the three runs: a directory of its own, and the command that starts or continues
    it.
    """

    home: Path
    command: Sequence[str]
    steps: int
    before: int = 0  # bytes of output before the last start
    finished: bool = False

    def live(self, until: Callable[[Snapshot], bool] = lambda seen: False) -> list[Snapshot]:
        """Start, and SIGKILL as soon as ``until`` says so; returns what was seen, change by change,
        and at the end.
        """
        self.home.mkdir(parents=True, exist_ok=True)
        found, beginning = self._record(), time.monotonic()
        life, told = [Snapshot(0.0, -1, False)], beginning
        with (self.home / "output.txt").open("ab") as output:
            self.before = output.tell()
            process = subprocess.Popen(
                self.command, stdout=output, stderr=output, start_new_session=True
            )
        try:
            while process.poll() is None:
                seen = self._look(found, time.monotonic() - beginning)
                if (seen.step, seen.saved) != (life[-1].step, life[-1].saved):
                    life.append(seen)
                if until(seen):
                    process.kill()
                    process.wait()
                    return [*life, self._look(found, time.monotonic() - beginning)]
                if time.monotonic() - told > TELL:
                    told = time.monotonic()
                    print(f"    {self.home.name}: {_place(seen.step)} of {self.steps}", flush=True)
                time.sleep(LOOK)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with its data workers
        if code := process.returncode:
            fail(
                f"{self.output()[-3000:]}\n{self.home.name}: train.py ended with exit code {code}; "
                f"nothing is proved"
            )
        self.finished = True
        return [*life, Snapshot(time.monotonic() - beginning, self.steps, True)]

    def output(self) -> str:
        """What the last start has printed."""
        return (self.home / "output.txt").read_bytes()[self.before :].decode(errors="replace")

    def rows(self) -> list[dict[str, str]]:
        """Of ``metrics.csv``."""
        with (self.home / "metrics.csv").open(newline="") as file:
            return [row for row in csv.DictReader(file) if row["step"].isdigit()]

    def _look(self, found: tuple[int, ...], seconds: float) -> Snapshot:
        saved = any((self.home / "checkpoints").glob("step-*"))
        return Snapshot(seconds, -1 if self._record() == found else self._last_step(), saved)

    def _record(self) -> tuple[int, ...]:
        """Another one when the record has changed."""
        path = self.home / "metrics.csv"
        return ((s := path.stat()).st_ino, s.st_size, s.st_mtime_ns) if path.exists() else ()

    def _last_step(self) -> int:
        with (self.home / "metrics.csv").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            *lines, _ = file.read().split(b"\n")  # what is behind the last newline is being written
        number = lines[-1].split(b",")[0] if lines else b""
        return int(number) if number.isdigit() else 0


def prove(project: Path, words: list[str]) -> int:
    """Run the proof, print its table and verdict; 0 proved, 1 not, 2 a mistake in the command, 130
    interrupted.
    """
    try:
        check_system()
    except UnsupportedSystemError as error:
        fail(f"error: {error}", 2)
    own = dict(word.split("=", 1) for word in words if word.startswith(("kills=", "break=")))
    overrides = [word for word in words if not word.startswith(("kills=", "break="))]
    if not own.get("kills", "5").isdigit() or own.get("break", "order") not in (
        "order",
        "noise",
        "dropout",
    ):
        fail(USAGE, 2)
    cfg, kills = composed(project, overrides), int(own.get("kills", "5"))
    once, twice, killed = three_runs(project, cfg, overrides, own.get("break"))
    print(
        f"{cfg.name}: {once.steps} steps, three times, the third with kills={kills}\nin "
        f"{once.home.parent}"
    )
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        print("once: running ...", flush=True)
        once.live()
        print("twice: running ...", flush=True)
        life = twice.live()
        if not agree(once, twice):
            print(
                "NOT PROVED: two undisturbed runs already differ: this stack is not deterministic"
            )
            return 1
        resumed = campaign(killed, instants(life, kills, random.Random()))
    except KeyboardInterrupt:
        fail("interrupted; nothing is proved", 130)
    if not agree(once, killed):
        print("NOT PROVED: undisturbed runs agree, and the killed one does not")
        return 1
    print("PROVED: the killed run ended in the same bits" if resumed else INCONCLUSIVE)
    return 0 if resumed else 1


def composed(project: Path, overrides: list[str]) -> DictConfig:
    """The config of ``overrides``; leaves the program with the near misses if they are mistaken."""
    from sturdy.cli.main import UsageError, compose_run, open_search_path

    train = project / "conf" / "train.yaml"
    try:
        return compose_run(train, open_search_path(train, overrides))
    except UsageError as mistake:
        fail(f"error: {mistake}\n{USAGE}", 2)


def three_runs(
    project: Path, cfg: DictConfig, overrides: list[str], broken: str | None
) -> list[Run]:
    """Runs ``once``, ``twice`` and ``killed`` in a new directory beside the run that the config
    names.
    """
    number = 1
    while (proof := Path(cfg.paths.runs) / f"{cfg.name}-proof" / f"{number:03}").exists():
        number += 1
    door = [
        *(["-m", "sturdy.fault_injection", broken] if broken else []),
        str(project / "train.py"),
    ]

    def run(name: str) -> Run:
        words = [*overrides, f"name={cfg.name}-proof/{proof.name}/{name}"]
        return Run(proof / name, [sys.executable, *door, *words], cfg.trainer.max_steps)

    return [run("once"), run("twice"), run("killed")]


def instants(life: Sequence[Snapshot], kills: int, rng: random.Random) -> list[KillPoint]:
    """Random instants of an undisturbed ``life``: of each five the second and third in start-up,
    the others spread.

    The last one has a checkpoint behind it, and steps before it, if there is such a time.
    """
    begins = next(seen.seconds for seen in life if seen.step >= 0)
    spread = [i for i in range(kills) if i % 5 not in (1, 2)]
    share = (life[-1].seconds - begins) / max(1, len(spread))
    times = [begins + share * (k + rng.random()) for k in range(len(spread))]
    before_the_end = [seen.seconds for seen in life[:-1] if seen.saved]
    if times and before_the_end:
        times[-1] = rng.uniform(before_the_end[0], before_the_end[-1])
    at = dict(zip(spread, sorted(times), strict=True))

    def instant(seconds: float) -> KillPoint:
        last = [seen for seen in life if seen.seconds <= seconds][-1]
        return KillPoint(last.step, last.saved, seconds - last.seconds)

    return [
        instant(at[i]) if i in at else KillPoint(-1, False, rng.uniform(0, begins))
        for i in range(kills)
    ]


def campaign(run: Run, kills: Sequence[KillPoint]) -> bool:
    """Kill at each instant, then let it finish, a line a start; returns whether any resumed from a
    checkpoint.
    """
    print("killed: running ...\n    start  entered at    killed", flush=True)
    resumed = False
    for number, kill in enumerate([*kills, None], 1):
        end = (run.live(kill) if kill else run.live())[-1]
        entered = re.search(r"(?:resumed from|finished at) (step \d+)|fresh", run.output())
        resumed |= bool(entered and entered[0].startswith("resumed"))
        origin = (entered[1] or entered[0]) if entered else "-"
        print(
            f"    {number:5}  {origin:12}  {'finished' if run.finished else _place(end.step)}",
            flush=True,
        )
        if run.finished:
            break
    if number <= len(kills):
        print(f"    it finished before kill {number}, so that there were fewer than {len(kills)}")
    return resumed


def agree(once: Run, other: Run) -> bool:
    """Compare the newest checkpoints and the records, and say what differs; the first step that
    does is named.
    """
    from exact_resume.checkpoint.compare import diff_checkpoints, first_divergence
    from exact_resume.checkpoint.store import Store, load_state

    states = []
    for run in (once, other):
        store = Store(run.home / "checkpoints")
        states.append(load_state(store.state(store.steps()[-1])))
    odd, row = diff_checkpoints(*states), first_divergence(once.rows(), other.rows())
    tensors = (
        f"{len(odd)} values differ, such as\n    {min(odd, key=len)}"
        if odd
        else "every tensor equal"
    )
    rows = f"first difference at step {row[0]}, {row[1]}" if row else "every logged value equal"
    print(
        f"once against {other.home.name}: {tensors};",
        rows,
        sep="\n    " if odd else " ",
        flush=True,
    )
    return not odd and row is None


def fail(message: str, code: int = 1) -> NoReturn:
    """Leave the program."""
    print(message, file=sys.stderr)
    sys.exit(code)


def _place(step: int) -> str:
    return f"at step {step}" if step >= 0 else "in start-up"
