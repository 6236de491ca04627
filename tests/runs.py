"""Start, kill and compare real runs in real processes, small enough for a test."""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path

from exact_resume.checkpoint.compare import diff_checkpoints
from exact_resume.checkpoint.store import Store, load_state
from exact_resume.metrics import MetricsCSV

ROOT = Path(__file__).resolve().parents[1]
# A process has one fork server: its imports are chosen here, and nowhere else.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "sturdy.training.session",
        "examples.cars.source",
        "sturdy.backbone",
        *("diffusers.models.unets.unet_2d_condition", "diffusers.models.autoencoders"),
        *("transformers.models.clip", "peft"),
    ]
)
COMMON = [
    "trainer=cpu",
    "trainer.threads=1",
    "trainer.max_steps=12",
    "trainer.val_check_interval=4",
    "trainer.log_every_n_steps=2",
    "data.image_size=16",
    "data.batch_size=8",
    "data.source.n=60",
    "data.holdout=0.2",
    "data.split=count",  # 12 held out, and 48 trained on: the tests know when an epoch ends
    "sampler.steps=2",
    "callbacks.checkpoint.every_n_train_steps=3",
    "callbacks.samples.every_n_steps=6",
    "callbacks.samples.n=8",
    "backbone.dropout=0.2",
]
SMALL = [
    *COMMON,
    "backbone=aligned_dit",
    "backbone.width=32",
    "backbone.depth=2",
    "backbone.heads=2",
    "backbone.global_units=4",
]
SMALL_UNET = [
    *COMMON,
    "backbone=unet",
    "backbone.width=8",
    "backbone.head_dim=8",
    "backbone.multipliers=[1,2]",
    "backbone.attention=[False,True]",
    "backbone.blocks=1",
]


def command(
    tmp: Path, name: str, *overrides: str, base: list[str] = SMALL, sabotage: str = ""
) -> list[str]:
    """Return the command line of a small run; ``sabotage`` is a fault of sabotage.py."""
    paths = [f"paths.runs={tmp / 'runs'}", f"paths.cache={tmp / 'cache'}", f"name={name}"]
    before = [str(ROOT / "tests" / "sabotage.py"), sabotage] if sabotage else []
    return [sys.executable, *before, str(ROOT / "train.py"), *base, *paths, *overrides]


def train(
    tmp: Path,
    name: str,
    *overrides: str,
    base: list[str] = SMALL,
    sabotage: str = "",
    code: int = 0,
) -> subprocess.CompletedProcess[str]:
    """Run to the end; the exit code must be ``code``."""
    done = run_forked(tmp, name, command(tmp, name, *overrides, base=base, sabotage=sabotage)[1:])
    assert done.returncode == code, done.stdout + done.stderr
    return done


def kill_at(
    tmp: Path,
    name: str,
    step: int,
    *overrides: str,
    base: list[str] = SMALL,
    sabotage: str = "",
    after: float = 0.0,
    saved: bool = False,
) -> None:
    """Start the run and SIGKILL it ``after`` seconds from when its metrics show ``step``.

    With ``saved`` it has committed a checkpoint by then, too, which it does in the background.
    """
    metrics = tmp / "runs" / name / "metrics.csv"
    store = Store(tmp / "runs" / name / "checkpoints")
    process, out, err = start(tmp, name, *overrides, base=base, sabotage=sabotage)
    while process.exitcode is None:
        if (
            metrics.exists()
            and any(line.startswith(f"{step},") for line in metrics.read_text().splitlines())
            and (store.steps() or not saved)
        ):
            time.sleep(after)
            process.kill()
            break
        time.sleep(0.005)
    process.join()
    assert process.exitcode == -signal.SIGKILL, out.read_text() + err.read_text()


def start(
    tmp: Path, name: str, *overrides: str, base: list[str] = SMALL, sabotage: str = ""
) -> tuple[BaseProcess, Path, Path]:
    """Start ``command``; return the process, and the files of its output and its errors."""
    return fork(tmp, name, command(tmp, name, *overrides, base=base, sabotage=sabotage)[1:])


def run_forked(tmp: Path, name: str, words: list[str]) -> subprocess.CompletedProcess[str]:
    """Run ``python *words`` to its end, as ``fork`` does; like ``subprocess.run``."""
    process, out, err = fork(tmp, name, words)
    process.join(300)
    return subprocess.CompletedProcess(words, process.exitcode, out.read_text(), err.read_text())


def run_script(tmp: Path, script: str, *words: str, code: int = 0) -> str:
    """Return what ``sample`` or ``evaluate`` says to ``words``; it must end in ``code``."""
    paths = [f"paths.runs={tmp / 'runs'}", f"paths.cache={tmp / 'cache'}", "threads=1"]
    done = run_forked(tmp, script, [str(ROOT / f"{script}.py"), *paths, *words])
    said = done.stdout + done.stderr
    assert done.returncode == code, said
    assert "Traceback" not in said
    return said


def fork(tmp: Path, name: str, words: list[str]) -> tuple[BaseProcess, Path, Path]:
    """Run ``python *words``, forked from a process that has imported what a run needs.

    Imports would take most of a small run's time. Returns as ``start`` does.
    """
    out, err = (tmp / f"{name.replace('/', '-')}.{kind}" for kind in ("out", "err"))
    process = SERVER.Process(target=_become, args=(words, dict(os.environ), str(out), str(err)))
    process.start()
    return process, out, err


def _become(words: list[str], environment: dict[str, str], out: str, err: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    found = [
        path
        for path in environment.get("PYTHONPATH", "").split(os.pathsep)
        if path and path not in sys.path
    ]
    sys.path[:0] = [str(Path(words[0]).parent), *found]
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(write_through=True)  # type: ignore[union-attr]
    sys.argv = words
    sys.orig_argv = [sys.executable, *words]  # what a run starts its workers with
    runpy.run_path(words[0], run_name="__main__")


def differences(tmp: Path, a: str, b: str) -> list[str]:
    """Return what differs in bits between two runs: weights, EMA, optimizer, logged losses."""
    states = []
    for name in (a, b):
        store = Store(tmp / "runs" / name / "checkpoints")
        manifest = store.last()
        assert manifest is not None
        states.append(load_state(store.state(manifest["step"])))
    odd = diff_checkpoints(*states)
    left, right = Counter(losses(tmp, a)), Counter(losses(tmp, b))
    return odd + [f"row {row}" for row in ((left - right) + (right - left))]


def losses(tmp: Path, name: str) -> list[tuple[str, ...]]:
    """Return step, losses and gradient norm of every row of ``metrics.csv``, as text."""
    rows = MetricsCSV(tmp / "runs" / name / "metrics.csv").rows()
    keys = ("step", "train/loss", "train/grad_norm", "val/loss")
    return sorted(tuple(row.get(k) or "" for k in keys) for row in rows)
