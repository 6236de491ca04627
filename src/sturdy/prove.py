"""The proof of the promise, for any config on any machine: once, twice, and once more under SIGKILL.

    once == twice    the stack is deterministic at all
    once == killed   and resuming loses and changes nothing: every weight, EMA, optimizer tensor and logged loss

Real processes, real SIGKILL at random instants, comparison of bits. ``break=order``, ``break=noise`` and
``break=dropout`` take a mechanism away in all three runs: the proof must then fail, or it would prove nothing.
"""

import csv
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from omegaconf import DictConfig

USAGE = """usage: python prove.py experiment=cars [kills=N] [break=order|noise|dropout] [any override of train.py]
Trains three times, the third time killed N (default 5) times at random instants, and compares every bit."""


@dataclass
class Run:
    """One of the three runs: a directory of its own, and the command that starts or continues it."""

    home: Path
    command: Sequence[str]

    def start(self) -> subprocess.Popen[bytes]:
        self.home.mkdir(parents=True, exist_ok=True)
        with (self.home / "output.txt").open("ab") as output:
            return subprocess.Popen(self.command, stdout=output, stderr=output)

    def finish(self) -> None:
        """Run to the end; leaves the program with the output's tail if that fails."""
        print(f"{self.home.name}: running ...", flush=True)
        if code := self.start().wait():
            tail = (self.home / "output.txt").read_text(errors="replace")[-3000:]
            fail(f"{tail}\n{self.home.name}: train.py ended with exit code {code}; nothing is proved")

    def kill(self, step: int, rng: random.Random) -> str | None:
        """Start, and SIGKILL at a random instant after ``step`` is recorded; None if it finished before."""
        process, rows, beginning = self.start(), len(self.rows()), time.monotonic()
        while self.last_step() < step:
            if process.poll() is not None:
                return None
            time.sleep(0.01)
        seconds = (time.monotonic() - beginning) / max(1, len(self.rows()) - rows)  # a step, start-up included
        time.sleep(rng.uniform(0, min(30, 3 * seconds)))
        if process.poll() is not None:
            return None
        process.send_signal(signal.SIGKILL)
        process.wait()
        return f"killed, with step {self.last_step()} recorded"

    def rows(self) -> list[dict[str, str]]:
        path = self.home / "metrics.csv"
        if not path.exists():
            return []
        with path.open(newline="") as file:
            lines = [line for line in file if line.endswith("\n")]
        return [row for row in csv.DictReader(lines) if row["step"].isdigit()]

    def last_step(self) -> int:
        return max((int(row["step"]) for row in self.rows()), default=0)


def prove(project: Path, words: list[str]) -> int:
    """Run the proof, print its table and verdict; 0 proved, 1 not, 2 a mistake in the command."""
    own = dict(word.split("=", 1) for word in words if word.startswith(("kills=", "break=")))
    overrides = [word for word in words if not word.startswith(("kills=", "break="))]
    if not own.get("kills", "5").isdigit() or own.get("break", "order") not in ("order", "noise", "dropout"):
        fail(USAGE, 2)
    cfg = composed(project, overrides)
    kills, steps = int(own.get("kills", "5")), int(cfg.trainer.max_steps)
    once, twice, killed = three_runs(project, cfg, overrides, own.get("break"))
    seed = int.from_bytes(os.urandom(4))
    print(f"{cfg.name}: {steps} steps, three times, the third with {kills} kills (seed {seed}); in {once.home.parent}")
    once.finish()
    twice.finish()
    rng = random.Random(seed)
    for number, step in enumerate(sorted(rng.randrange(steps) for _ in range(kills)), 1):
        print(f"kill {number}/{kills}: {killed.kill(step, rng) or 'it finished before'}", flush=True)
    killed.finish()
    return verdict(once, twice, killed)


def composed(project: Path, overrides: list[str]) -> DictConfig:
    """The config of ``overrides``; leaves the program with the near misses if they are mistaken."""
    from hydra import compose, initialize_config_dir

    from sturdy.door import Mistake, check, check_composed

    train = project / "conf" / "train.yaml"
    try:
        check(train, overrides)
        with initialize_config_dir(str(train.parent), version_base="1.3"):
            cfg = compose("train", overrides)
        check_composed(cfg)
    except Mistake as mistake:
        fail(f"error: {mistake}\n{USAGE}", 2)
    return cfg


def three_runs(project: Path, cfg: DictConfig, overrides: list[str], broken: str | None) -> list[Run]:
    """Runs ``once``, ``twice`` and ``killed`` in a new directory beside the run that the config names."""
    number = 1
    while (proof := Path(cfg.paths.runs) / f"{cfg.name}-proof" / f"{number:03}").exists():
        number += 1
    door = [*(["-m", "sturdy.sabotage", broken] if broken else []), str(project / "train.py")]
    return [
        Run(proof / name, [sys.executable, *door, *overrides, f"name={cfg.name}-proof/{proof.name}/{name}"])
        for name in ("once", "twice", "killed")
    ]


def verdict(once: Run, twice: Run, killed: Run) -> int:
    """Compare and say; the first step that differs is named."""
    from sturdy.resume.compare import differing, first_divergence
    from sturdy.resume.store import Store, load_state

    newest = []
    for run in (once, twice, killed):
        store = Store(run.home / "checkpoints")
        manifest = store.last()
        assert manifest is not None
        newest.append(load_state(store.state(manifest["step"])))
    equal = {}
    for run, state in ((twice, newest[1]), (killed, newest[2])):
        odd, row = differing(newest[0], state), first_divergence(once.rows(), run.rows())
        equal[run.home.name] = not odd and row is None
        tensors = f"{len(odd)} tensors differ, such as {odd[0]}" if odd else "every tensor equal"
        rows = f"first difference at step {row[0]}, {row[1]}" if row else "every logged value equal"
        print(f"once against {run.home.name}: {tensors}; {rows}")
    if all(equal.values()):
        print("PROVED: the killed run ended in the same bits")
        return 0
    if not equal["twice"]:
        print("NOT PROVED: two undisturbed runs already differ: this stack is not deterministic")
    else:
        print("NOT PROVED: undisturbed runs agree, and the killed one does not")
    return 1


def fail(message: str, code: int = 1) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(code)
