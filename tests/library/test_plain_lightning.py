"""A stock Lightning project, made unlosable in a few lines, is killed and ends in the same bits."""

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from exact_resume.checkpoint.compare import diff_checkpoints, first_divergence
from exact_resume.checkpoint.store import Store, load_state
from exact_resume.metrics import MetricsCSV
from runs import ROOT, fork

SCRIPT = ROOT / "examples" / "plain_lightning" / "train.py"
STEPS = 400

# The same project without the lines of exact_resume: Lightning's own checkpoints and resume.
STOCK = """
import sys
sys.path.insert(0, sys.argv[2])
import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from train import Classifier, spirals

L.seed_everything(0)
home = sys.argv[1]
saver = ModelCheckpoint(home, filename="{step}", every_n_train_steps=50, save_last=True)
trainer = L.Trainer(
    accelerator="cpu", max_steps=400, callbacks=[saver], logger=False, enable_progress_bar=False,
    deterministic=True, enable_model_summary=False,
)
loader = DataLoader(spirals(4000, 1), batch_size=32, shuffle=True)
trainer.fit(Classifier(), loader, ckpt_path="last")
"""


def finish(home: Path, *words: str) -> str:
    """Run a script, forked, to its end in ``home``; return what it printed."""
    process, out, err = fork(home.parent, home.name, list(words))
    process.join(600)
    output = out.read_text() + err.read_text()
    assert process.exitcode == 0, output
    return output


def kill_when(happened: Callable[[], bool], home: Path, *words: str) -> None:
    """Start a script, forked, and SIGKILL it once it ``happened``; it must not be finished."""
    process, _, _ = fork(home.parent, home.name, list(words))
    while process.exitcode is None and not happened():
        time.sleep(0.005)
    assert process.exitcode is None, "it finished before it was killed"
    process.kill()
    process.join()


def last_step(home: Path) -> int:
    metrics = home / "metrics.csv"
    if not metrics.exists():
        return 0
    lines = metrics.read_text().splitlines()[1:]
    return max((int(line.split(",")[0]) for line in lines[:-1]), default=0)


def assert_same_bits(one: Path, two: Path, steps: int) -> None:
    states = []
    for home in (one, two):
        store = Store(home / "checkpoints")
        assert store.steps()[-1] == steps
        states.append(load_state(store.state(steps)))
    assert diff_checkpoints(*states) == []
    rows = [MetricsCSV(home / "metrics.csv").rows() for home in (one, two)]
    assert first_divergence(*rows) is None
    assert states[0]["optimizer_states"][0]["state"], "there is something to compare"


def campaign(tmp_path: Path, kills: int, steps: int) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    finish(undisturbed, str(SCRIPT), str(undisturbed), str(steps))
    rng = random.Random(0)
    for _ in range(kills):
        goal = last_step(killed) + rng.randrange(20, 120)
        reached = partial(lambda goal: last_step(killed) >= goal, goal)
        kill_when(reached, killed, str(SCRIPT), str(killed), str(steps))
    assert "resumed from step" in finish(killed, str(SCRIPT), str(killed), str(steps))
    assert_same_bits(undisturbed, killed, steps)


def test_it_ends_in_the_same_bits_after_two_kills(tmp_path: Path) -> None:
    campaign(tmp_path, 2, 600)


@pytest.mark.slow
def test_it_ends_in_the_same_bits_after_ten_kills(tmp_path: Path) -> None:
    campaign(tmp_path, 10, 3000)


def test_a_signal_saves_and_a_changed_config_is_refused(tmp_path: Path) -> None:
    home = tmp_path / "run"
    command = [sys.executable, str(SCRIPT), str(home), str(STEPS)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while process.poll() is None and last_step(home) < 60:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert "Run the same command to continue" in output
    other = (
        "import sys; sys.argv = ['x']; sys.path.insert(0, sys.argv.pop() and "
        f"{str(SCRIPT.parent)!r}); import train; "
        "train.Classifier.__init__.__defaults__ = (400, 1e-2); "
        f"train.main({str(home)!r})"
    )
    done = subprocess.run([sys.executable, "-c", other], capture_output=True, text=True, timeout=60)
    assert "lr: 0.003 -> 0.01" in done.stderr
    assert "Traceback" not in done.stderr


def test_control_without_the_lines_of_exact_resume_the_bits_differ(tmp_path: Path) -> None:
    script = tmp_path / "stock.py"
    script.write_text(STOCK)
    for name in ("undisturbed", "killed"):
        words = (str(script), str(tmp_path / name), str(SCRIPT.parent))
        if name == "killed":
            kill_when((tmp_path / name / "step=150.ckpt").exists, tmp_path / name, *words)
        finish(tmp_path / name, *words)
    ends = []
    for name in ("undisturbed", "killed"):
        state = torch.load(tmp_path / name / "last.ckpt", weights_only=True)
        assert state["global_step"] == STEPS
        ends.append(state["state_dict"])
    assert any(not torch.equal(a, b) for a, b in zip(*map(dict.values, ends), strict=True))
