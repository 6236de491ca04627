"""A stock Lightning project in two processes is killed and ends in the same bits."""

import os
import random
import signal
import time
from itertools import count
from pathlib import Path

import pytest
import torch

from exact_resume.checkpoint.compare import diff_checkpoints, first_divergence
from exact_resume.checkpoint.store import Store, load_state
from exact_resume.metrics import MetricsCSV
from exact_resume.workers import reserve_port, worker_environment
from runs import ROOT, fork

# The module of examples/plain_lightning, with batch normalization, in argv[2] processes.
SCRIPT = """
import sys
sys.path.insert(0, EXAMPLE)
from exact_resume import Checkpoint, ExactTraining, PositionData
from exact_resume.callbacks.reduce_gradients import ReduceGradients
import lightning as L
from torch import nn
from train import Classifier, spirals

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


NUMBERS = count()


class Start:
    """One start of the script: forked, as all that it would import takes longer than it trains."""

    def __init__(self, tmp: Path, name: str, words: list[str]) -> None:
        self.home = tmp / name
        self.process, *self.files = fork(tmp, f"{name}-{next(NUMBERS)}", words)

    def finish(self, code: int = 0) -> str:
        self.process.join(300)
        output = "".join(file.read_text() for file in self.files)
        assert self.process.exitcode == code, output
        return output

    def until_more(self, more: int) -> "Start":
        """Return when the record has ``more`` rows more than now."""
        goal = rows(self.home) + more
        while self.process.exitcode is None and rows(self.home) < goal:
            time.sleep(0.005)
        assert self.process.exitcode is None, "it finished before it was stopped"
        return self

    def workers(self) -> list[int]:
        pid = self.process.pid
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture
def start(tmp_path: Path):
    """A function that starts the script, which starts its processes."""
    script = tmp_path / "train_two.py"
    script.write_text(SCRIPT.replace("EXAMPLE", repr(str(ROOT / "examples" / "plain_lightning"))))

    def start(
        name: str, processes: int = 2, steps: int = 400, dropout: float = 0.2, remove: str = "keep"
    ) -> Start:
        options = [str(processes), str(steps), str(dropout), remove]
        return Start(tmp_path, name, [str(script), str(tmp_path / name), *options])

    return start


@pytest.fixture
def launch(start, monkeypatch):
    """A function that starts two processes of the script by itself, as torchrun does."""

    def launch(name: str, *options) -> list[Start]:
        with reserve_port() as port, monkeypatch.context() as patch:
            started = []
            for rank in range(2):
                for key, value in worker_environment(rank, 2, port, 0).items():
                    patch.setenv(key, value)
                started.append(start(name, 2, *options))
        return started

    return launch


def finish_all(started: list[Start], code: int = 0) -> str:
    return "".join(each.finish(code) for each in started)


def rows(home: Path) -> int:
    path = home / "metrics.csv"
    return len(path.read_text().splitlines()) if path.exists() else 0


def last_state(home: Path, steps: int) -> dict:
    return load_state(Store(home / "checkpoints").state(steps))


@pytest.mark.parametrize("victims", [(1,), pytest.param((0, 1, None), marks=pytest.mark.slow)])
def test_kills_of_a_process_or_of_their_parent_end_in_the_same_bits(
    start, launch, tmp_path, victims
):
    output = finish_all(launch("whole"))
    assert output.count("fresh, to step 400") == 1
    assert output.count("finished at step 400") == 1
    rng = random.Random(0)
    for victim in victims:  # None is the parent
        killed = start("killed").until_more(rng.randrange(30, 90))
        if victim is None:
            killed.process.kill()
            killed.process.join()
            continue
        os.kill(killed.workers()[victim], signal.SIGKILL)
        killed.finish(1)
    told = start("killed").until_more(20)
    told.process.terminate()
    assert "Run the same command to continue." in told.finish(75)
    output = start("killed").finish()
    assert "resumed from step" in output
    assert "(bitwise" in output
    whole, killed = last_state(tmp_path / "whole", 400), last_state(tmp_path / "killed", 400)
    assert "network.1.running_mean" in whole["state_dict"]
    assert diff_checkpoints(whole, killed) == []
    records = [MetricsCSV(tmp_path / name / "metrics.csv").rows() for name in ("whole", "killed")]
    assert first_divergence(*records) is None
    assert "nothing to do" in finish_all(launch("killed"))


def test_two_processes_compute_the_gradient_of_one(start, launch, tmp_path):
    """Without dropout, they differ from one process in rounding only; unreduced, in more."""
    start("one", 1, 20, 0.0).finish()
    finish_all(launch("two", 20, 0.0))
    finish_all(launch("not", 20, 0.0, "remove"))
    one, two, unreduced = (
        last_state(tmp_path / n, 20)["state_dict"] for n in ("one", "two", "not")
    )
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4)
    assert any((unreduced[name] - value).abs().max() > 1e-2 for name, value in one.items())


def test_another_number_of_processes_is_no_bitwise_resume(start, launch, tmp_path):
    first, second = launch("run")
    first.until_more(60)
    second.process.terminate()
    finish_all([first, second], 75)
    output = start("run", 1).finish()
    assert "(same samples" in output
    assert "mean over 2 processes -> mean over 1 processes" in output


def test_a_trainer_that_starts_processes_by_itself_is_refused(tmp_path):
    example = (ROOT / "examples" / "plain_lightning" / "train.py").read_text()
    script = tmp_path / "train.py"
    script.write_text(example.replace('accelerator="cpu",', 'accelerator="cpu", devices=2,'))
    output = Start(tmp_path, "run", [str(script), str(tmp_path / "run")]).finish(2)
    assert "Say ExactTraining(processes=2) instead of devices= and strategy=" in output
    assert not (tmp_path / "run").exists()
