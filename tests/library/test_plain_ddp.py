"""A stock Lightning project in two processes is killed and ends in the same bits."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from exact_resume.checkpoint.compare import diff_checkpoints, first_divergence
from exact_resume.checkpoint.store import Store, load_state
from exact_resume.metrics import MetricsCSV
from runs import ROOT

# The module of examples/plain_lightning, with batch normalization, in argv[2] processes.
SCRIPT = """
import sys
sys.path.insert(0, EXAMPLE)
import lightning as L
from torch import nn
from train import Classifier, spirals
from exact_resume import Checkpoint, ExactTraining, PositionData
from exact_resume.callbacks.reduce_gradients import ReduceGradients

class Normalized(Classifier):
    def __init__(self, dropout):
        super().__init__()
        for module in self.network.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout
        if dropout:
            self.network[1] = nn.BatchNorm1d(64)

home, processes, steps, dropout, remove = sys.argv[1:]
L.seed_everything(0, verbose=False)
training = ExactTraining(
    home, config={"steps": steps}, processes=int(processes),
    checkpoint=Checkpoint(every_n_train_steps=20),
)
data = PositionData(spirals(4000, 1), spirals(400, 2), batch_size=32)
options = training.trainer_options()
if remove == "remove":
    options["callbacks"] = [c for c in options["callbacks"] if not isinstance(c, ReduceGradients)]
trainer = L.Trainer(
    accelerator="cpu", max_steps=int(steps), val_check_interval=50, enable_progress_bar=False,
    gradient_clip_val=1.0, **options,
)
sys.exit(training.fit(trainer, Normalized(float(dropout)), data))
"""


@pytest.fixture
def start(tmp_path: Path):
    script = tmp_path / "train_two.py"
    script.write_text(SCRIPT.replace("EXAMPLE", repr(str(ROOT / "examples" / "plain_lightning"))))

    def start(
        name: str, processes: int = 2, steps: int = 400, dropout: float = 0.2, remove: str = "keep"
    ) -> subprocess.Popen[str]:
        words = [str(tmp_path / name), str(processes), str(steps), str(dropout), remove]
        command = [sys.executable, str(script), *words]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    output, errors = process.communicate(timeout=300)
    assert process.returncode == code, output + errors
    return output + errors


def rows(home: Path) -> int:
    path = home / "metrics.csv"
    return len(path.read_text().splitlines()) if path.exists() else 0


def wait_for_more(process: subprocess.Popen[str], home: Path, more: int) -> None:
    goal = rows(home) + more
    while process.poll() is None and rows(home) < goal:
        time.sleep(0.005)
    assert process.poll() is None, "it finished before it was stopped"


def workers(process: subprocess.Popen[str]) -> list[int]:
    text = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(pid) for pid in text.split()]


def last_state(home: Path, steps: int) -> dict:
    return load_state(Store(home / "checkpoints").state(steps))


@pytest.mark.parametrize("victims", [(1,), pytest.param((0, 1, None), marks=pytest.mark.slow)])
def test_kills_of_a_process_or_of_their_parent_end_in_the_same_bits(start, tmp_path, victims):
    output = finish(start("whole"))
    assert output.count("fresh, to step 400") == 1
    assert output.count("finished at step 400") == 1
    rng = random.Random(0)
    for victim in victims:  # None is the parent
        process = start("killed")
        wait_for_more(process, tmp_path / "killed", rng.randrange(30, 90))
        if victim is None:
            process.kill()
            process.wait()
            continue
        os.kill(workers(process)[victim], signal.SIGKILL)
        finish(process, 1)
    process = start("killed")
    wait_for_more(process, tmp_path / "killed", 20)
    process.send_signal(signal.SIGTERM)
    assert "Run the same command to continue." in finish(process, 75)
    output = finish(start("killed"))
    assert "resumed from step" in output
    assert "(bitwise" in output
    whole, killed = last_state(tmp_path / "whole", 400), last_state(tmp_path / "killed", 400)
    assert "network.1.running_mean" in whole["state_dict"]
    assert diff_checkpoints(whole, killed) == []
    records = [MetricsCSV(tmp_path / name / "metrics.csv").rows() for name in ("whole", "killed")]
    assert first_divergence(*records) is None
    assert "nothing to do" in finish(start("killed"))


def test_two_processes_compute_the_gradient_of_one(start, tmp_path):
    """Without dropout, they differ from one process in rounding only; unreduced, in more."""
    for name, processes, remove in (("one", 1, "keep"), ("two", 2, "keep"), ("not", 2, "remove")):
        finish(start(name, processes, 20, 0.0, remove))
    one, two, unreduced = (
        last_state(tmp_path / n, 20)["state_dict"] for n in ("one", "two", "not")
    )
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4)
    assert any((unreduced[name] - value).abs().max() > 1e-2 for name, value in one.items())


def test_another_number_of_processes_is_no_bitwise_resume(start, tmp_path):
    process = start("run", 2)
    wait_for_more(process, tmp_path / "run", 60)
    process.send_signal(signal.SIGTERM)
    finish(process, 75)
    output = finish(start("run", 1))
    assert "(same samples" in output
    assert "mean over 2 processes -> mean over 1 processes" in output


def test_a_trainer_that_starts_processes_by_itself_is_refused(tmp_path):
    example = (ROOT / "examples" / "plain_lightning" / "train.py").read_text()
    script = tmp_path / "train.py"
    script.write_text(example.replace('accelerator="cpu",', 'accelerator="cpu", devices=2,'))
    command = [sys.executable, str(script), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert "Say ExactTraining(processes=2) instead of devices= and strategy=" in done.stderr
    assert not (tmp_path / "run").exists()
