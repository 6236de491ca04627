"""Prove on this machine, for any config, that kills change nothing.

The config is trained three times: ``once`` and ``twice`` undisturbed, ``killed`` under SIGKILL.

    once == twice     the stack is deterministic at all
    once == killed    resuming loses and changes nothing: every weight, EMA, optimizer tensor and
                      logged loss

Real processes, SIGKILL at random instants, comparison of bits. ``break=order``, ``break=noise`` and
``break=dropout`` take a mechanism away in all three runs: then the proof must fail, or it would
prove nothing.
"""

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
FAULTS = ("order", "noise", "dropout")  # of sturdy.fault_injection
POLL_S = 0.01  # seconds between two looks at a run
REPORT_S = 30.0  # seconds between two lines about it


@dataclass(frozen=True)
class Snapshot:
    """What the files of a run showed at one instant.

    Attributes:
        seconds: since its process was started.
        step: the newest in its metrics; -1 in start-up, while these are as the process found them.
        saved: whether there is a checkpoint.
    """

    seconds: float
    step: int
    saved: bool


@dataclass
class KillPoint:
    """An instant to kill a run: some time after a step was logged.

    Each start of the run passes it anew.

    Attributes:
        step: the step; -1 for an instant in start-up.
        saved: whether a checkpoint must be there, too.
        seconds: after that.
        since: when the step was reached; None before.
    """

    step: int
    saved: bool
    seconds: float
    since: float | None = None

    def __call__(self, now: Snapshot) -> bool:
        """Return whether the instant has come; one in start-up comes at its end at the latest."""
        if self.since is None and now.step >= self.step and now.saved >= self.saved:
            self.since = now.seconds
        start_up_is_over = self.step < 0 <= now.step
        time_is_over = self.since is not None and now.seconds - self.since >= self.seconds
        return start_up_is_over or time_is_over


@dataclass
class Run:
    """One of the three runs.

    Attributes:
        home: its directory.
        command: starts or continues it.
        steps: how many it trains.
        output_start: bytes of output before the last start.
        finished: whether it ended by itself.
    """

    home: Path
    command: Sequence[str]
    steps: int
    output_start: int = 0
    finished: bool = False

    def run_until(self, kill_now: Callable[[Snapshot], bool] = lambda now: False) -> list[Snapshot]:
        """Start the run, and SIGKILL it as soon as ``kill_now`` returns true.

        Returns:
            The timeline of this start: a snapshot for each change, and one of the end.
        """
        import exact_resume.metrics  # noqa: F401  seconds, which would be missing in the timeline

        self.home.mkdir(parents=True, exist_ok=True)
        found = self._metrics_version()
        start = time.monotonic()
        timeline = [Snapshot(0.0, -1, False)]
        last_report = start
        with (self.home / "output.txt").open("ab") as output:
            self.output_start = output.tell()
            process = subprocess.Popen(
                self.command, stdout=output, stderr=output, start_new_session=True
            )
        try:
            while process.poll() is None:
                now = self._look(found, time.monotonic() - start)
                if (now.step, now.saved) != (timeline[-1].step, timeline[-1].saved):
                    timeline.append(now)
                if kill_now(now):
                    process.kill()
                    process.wait()
                    return [*timeline, self._look(found, time.monotonic() - start)]
                if time.monotonic() - last_report > REPORT_S:
                    last_report = time.monotonic()
                    place = _describe_place(now.step)
                    print(f"    {self.home.name}: {place} of {self.steps}", flush=True)
                time.sleep(POLL_S)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with its data workers
        if code := process.returncode:
            fail(
                f"{self.output()[-3000:]}\n{self.home.name}: train.py ended with exit code {code}; "
                f"nothing is proved"
            )
        self.finished = True
        return [*timeline, Snapshot(time.monotonic() - start, self.steps, True)]

    def output(self) -> str:
        """Return what the last start has printed."""
        output = (self.home / "output.txt").read_bytes()
        return output[self.output_start :].decode(errors="replace")

    def rows(self) -> list[dict[str, str]]:
        """Return the rows of ``metrics.csv``."""
        from exact_resume.metrics import MetricsCSV

        return MetricsCSV(self.home / "metrics.csv").rows()

    def _look(self, found: tuple[int, ...], seconds: float) -> Snapshot:
        saved = any((self.home / "checkpoints").glob("step-*"))
        if self._metrics_version() == found:
            return Snapshot(seconds, -1, saved)
        rows = self.rows()
        return Snapshot(seconds, int(rows[-1]["step"]) if rows else 0, saved)

    def _metrics_version(self) -> tuple[int, ...]:
        """Return numbers that differ once ``metrics.csv`` was written."""
        path = self.home / "metrics.csv"
        if not path.exists():
            return ()
        status = path.stat()
        return (status.st_ino, status.st_size, status.st_mtime_ns)


def prove(project: Path, words: list[str]) -> int:
    """Run the proof and print its table and verdict.

    Args:
        project: the folder of train.py.
        words: of the command line.

    Returns:
        The exit code: 0 proved, 1 not proved, 2 a mistake in the command, 130 interrupted.
    """
    try:
        check_system()
    except UnsupportedSystemError as error:
        fail(f"error: {error}", 2)
    own_words = [word for word in words if word.startswith(("kills=", "break="))]
    options = dict(word.split("=", 1) for word in own_words)
    overrides = [word for word in words if word not in own_words]
    kills, fault = options.get("kills", "5"), options.get("break")
    if not kills.isdigit() or fault not in (None, *FAULTS):
        fail(USAGE, 2)
    cfg = compose_or_fail(project, overrides)
    once, twice, killed = make_runs(project, cfg, overrides, fault)
    print(
        f"{cfg.name}: {once.steps} steps, three times, the third with kills={kills}\nin "
        f"{once.home.parent}"
    )
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        print("once: running ...", flush=True)
        once.run_until()
        print("twice: running ...", flush=True)
        timeline = twice.run_until()
        if not are_equal(once, twice):
            print(
                "NOT PROVED: two undisturbed runs already differ: this stack is not deterministic"
            )
            return 1
        resumed = run_with_kills(killed, draw_kill_points(timeline, int(kills), random.Random()))
    except KeyboardInterrupt:
        fail("interrupted; nothing is proved", 130)
    if not are_equal(once, killed):
        print("NOT PROVED: undisturbed runs agree, and the killed one does not")
        return 1
    print("PROVED: the killed run ended in the same bits" if resumed else INCONCLUSIVE)
    return 0 if resumed else 1


def compose_or_fail(project: Path, overrides: list[str]) -> DictConfig:
    """Return the config of ``overrides``; end the process with a line if they are mistaken."""
    from sturdy.cli.main import compose_run
    from sturdy.cli.usage import UsageError

    try:
        return compose_run(project / "conf" / "train.yaml", overrides)
    except UsageError as error:
        fail(f"error: {error}\n{USAGE}", 2)


def make_runs(project: Path, cfg: DictConfig, overrides: list[str], fault: str | None) -> list[Run]:
    """Return the three runs, in a new directory beside the run that the config names."""
    number = 1
    while (proof := Path(cfg.paths.runs) / f"{cfg.name}-proof" / f"{number:03}").exists():
        number += 1
    script = [str(project / "train.py")]
    if fault:
        script = ["-m", "sturdy.fault_injection", fault, *script]
    runs = []
    for name in ("once", "twice", "killed"):
        words = [*overrides, f"name={cfg.name}-proof/{proof.name}/{name}"]
        command = [sys.executable, *script, *words]
        runs.append(Run(proof / name, command, cfg.trainer.max_steps))
    return runs


def draw_kill_points(
    timeline: Sequence[Snapshot], kills: int, rng: random.Random
) -> list[KillPoint]:
    """Draw random instants of an undisturbed run.

    Of each five the second and the third are in start-up; the others are spread over training. The
    last of these comes after a checkpoint and before the end, if there is such a time.
    """
    training = next(seen.seconds for seen in timeline if seen.step >= 0)
    in_training = [number for number in range(kills) if number % 5 not in (1, 2)]
    part = (timeline[-1].seconds - training) / max(1, len(in_training))
    times = [training + part * (k + rng.random()) for k in range(len(in_training))]
    with_checkpoint = [seen.seconds for seen in timeline[:-1] if seen.saved]
    if times and with_checkpoint:
        times[-1] = rng.uniform(with_checkpoint[0], with_checkpoint[-1])
    seconds_of = dict(zip(in_training, sorted(times), strict=True))
    points = []
    for number in range(kills):
        if number not in seconds_of:
            points.append(KillPoint(-1, False, rng.uniform(0, training)))
            continue
        seconds = seconds_of[number]
        before = [seen for seen in timeline if seen.seconds <= seconds][-1]
        points.append(KillPoint(before.step, before.saved, seconds - before.seconds))
    return points


def run_with_kills(run: Run, kills: Sequence[KillPoint]) -> bool:
    """Kill the run at each point, then let it finish; print a line for each start.

    Returns:
        Whether any start resumed from a checkpoint.
    """
    print("killed: running ...\n    start  entered at    killed", flush=True)
    resumed = False
    for number, kill in enumerate([*kills, None], 1):
        end = (run.run_until(kill) if kill else run.run_until())[-1]
        entered = re.search(r"(?:resumed from|finished at) (step \d+)|fresh", run.output())
        origin = "-"
        if entered:
            origin = entered[1] or entered[0]
            resumed = resumed or entered[0].startswith("resumed")
        outcome = "finished" if run.finished else _describe_place(end.step)
        print(f"    {number:5}  {origin:12}  {outcome}", flush=True)
        if run.finished:
            break
    if number <= len(kills):
        print(f"    it finished before kill {number}, so that there were fewer than {len(kills)}")
    return resumed


def are_equal(once: Run, other: Run) -> bool:
    """Compare the newest checkpoints and the metrics of two runs, and print what differs."""
    from exact_resume.checkpoint.compare import diff_checkpoints, first_divergence
    from exact_resume.checkpoint.store import Store, load_state

    states = []
    for run in (once, other):
        store = Store(run.home / "checkpoints")
        states.append(load_state(store.state(store.steps()[-1])))
    names = diff_checkpoints(*states)
    divergence = first_divergence(once.rows(), other.rows())
    line = f"once against {other.home.name}: "
    if names:
        line += f"{len(names)} values differ, such as\n    {min(names, key=len)};\n    "
    else:
        line += "every value equal; "
    if divergence:
        step, column = divergence
        line += f"first difference at step {step}, {column}"
    else:
        line += "every logged value equal"
    print(line, flush=True)
    return not names and divergence is None


def fail(message: str, code: int = 1) -> NoReturn:
    """Print ``message`` and end the process."""
    print(message, file=sys.stderr)
    sys.exit(code)


def _describe_place(step: int) -> str:
    return f"at step {step}" if step >= 0 else "in start-up"
