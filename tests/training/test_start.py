"""A start says whether it is fresh, resumed, finished or refused, and why; by the text."""

import json
import signal

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image

from exact_resume.metrics import MetricsCSV
from exact_resume.signals import SIGNALS
from runs import ROOT, command, run_forked, train
from sturdy.sampling.sample import main
from sturdy.training.build import load_module
from sturdy.training.run import train as train_in_process


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A directory with the finished run ``run``, and what its start said."""
    tmp = tmp_path_factory.mktemp("start")
    return tmp, train(tmp, "run")


def test_a_fresh_run_says_so_and_nothing_else_unasked(run):
    tmp, done = run
    assert "run: 60 images, 8 classes; fresh, to step 12" in done.stdout
    assert "finished at step 12; everything is in" in done.stdout
    assert done.stderr == ""  # no warnings, ours or a library's
    environment = json.loads(
        (tmp / "runs" / "run" / "attempts" / "001" / "environment.json").read_text()
    )
    assert environment["stack"]["threads"] == "1"


def test_the_same_command_on_a_finished_run_says_finished(run):
    assert (
        "finished at step 12 (trainer.max_steps=12), nothing to do" in train(run[0], "run").stdout
    )


def test_a_finished_run_is_finished_before_it_is_judged_and_what_differs_is_said(run):
    said = train(run[0], "run", "optimizer.lr=0.5", "data.source.n=61").stdout
    assert "finished at step 12 (trainer.max_steps=12), nothing to do" in said
    assert "to train this one, give it a name of its own: name=..." in said
    assert "optimizer.lr: 0.001 -> 0.5" in said
    assert "num_classes" not in said  # what the data fill in is no difference


PLAIN = "~optimizer.betas ~optimizer.fused ~optimizer.weight_decay"
REFUSALS = {
    "trainer.max_steps=13 optimizer.lr=0.5": [
        "optimizer.lr: 0.001 -> 0.5",
        "Undo the change",
        "ckpt_path=last",
        "name=...",
    ],
    "trainer.max_steps=13 seed=7": ["seed: 0 -> 7"],
    "ckpt_path=null": ["starts afresh, but", "has checkpoints up to step 12", "ckpt_path=auto"],
    "ckpt_path=nowhere": ["ckpt_path=nowhere is not there", "auto, last, best, null"],
    "name=other ckpt_path=last": ["ckpt_path=last, but", "has no checkpoint", "name=..."],
    "name=other ckpt_path=best": ["ckpt_path=best, but", "has no checkpoint"],
    "name=other init_from=nowhere": ["init_from=nowhere is not there", "runs in", "run"],
    "name=other init_from=run backbone.width=16": [
        "init_from=run holds another network: backbone.width 32 -> 16"
    ],
    f"name=other optimizer._target_=torch.optim.Muon {PLAIN}": [
        "optimizer torch.optim",
        "Muon only supports 2D",
    ],
    f"name=other optimizer._target_=torch.optim.LBFGS {PLAIN}": ["optimizer torch.optim", "LBFGS"],
    "name=other trainer.devices=0": ["trainer.devices=0 must be a number, or auto"],
    "name=other trainer.num_nodes=2": ["trainer.num_nodes=2", "torchrun"],
    "name=other reduction=ring": ["reduction=ring must be tree, allreduce or null"],
    "name=other restarts=-1": ["restarts=-1 must be a whole number"],
    "name=other trainer.precision=16-mixed": [
        "trainer.precision=16-mixed",
        "loss scale",
        "use bf16-mixed",
        "or 32-true",
    ],
    "name=other trainer.val_check_interval=0.5": [
        "trainer.val_check_interval=0.5 must be a whole number"
    ],
    "name=other trainer.limit_val_batches=0": [
        "trainer.limit_val_batches=0",
        "trainer.val_check_interval",
    ],
    "name=other trainer.limit_val_batches=-1": [
        "trainer.limit_val_batches=-1 must be a number of batches"
    ],
    "name=other trainer.limit_val_batches=2.5": [
        "trainer.limit_val_batches=2.5 must be",
        "a fraction up to 1.0",
    ],
    "name=other data.shards=3": ["data.batch_size=8 cannot be cut into data.shards=3 equal shards"],
    "name=other data.holdout=2": ["data.holdout=2 is a share"],
    "name=other data.image_size=17": ["backbone.image_size=17 must be a multiple of patch=2"],
    "name=other backbone.heads=7": ["backbone.width=32 must be a multiple of 4 * heads = 28"],
    "name=other target=velocity schedule=linear": ["velocity"],
    "name=other objective.label_drop=3": ["objective.label_drop=3"],
    "name=other callbacks.checkpoint.keep_last=0": [
        "callbacks.checkpoint.keep_last=0 must be at least 1"
    ],
}


@pytest.fixture
def own_handlers():
    """Whatever a run in this process does to signal handlers is undone."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("own_handlers")
def test_refusals_name_what_to_do_and_touch_nothing(run, capsys, monkeypatch):
    """In this process, by the function that the command line calls: imports would take longest."""
    tmp, _ = run
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    before = {
        path: path.read_bytes()
        for path in (tmp / "runs" / "run" / "checkpoints").rglob("*")
        if path.is_file()
    }
    for words, texts in REFUSALS.items():
        overrides = [*command(tmp, "run")[2:], *words.split()]
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            cfg = compose("train", overrides)
        assert train_in_process(cfg, overrides) == 2, words
        said = capsys.readouterr().err
        assert all(text in said for text in texts), f"{words}: {said}"
        assert "Traceback" not in said
    assert not (tmp / "runs" / "other" / "checkpoints").exists()
    assert before == {path: path.read_bytes() for path in before}


def test_on_purpose_from_last_from_best_and_from_a_path(run):
    tmp, _ = run
    home = tmp / "runs" / "run"
    last = train(tmp, "run", "optimizer.lr=0.0005", "trainer.max_steps=14", "ckpt_path=last").stdout
    assert "resumed from step 12" in last
    assert "a new trajectory begins at this step, as you asked" in last
    assert "the next resume of it is bitwise again" in last
    assert "optimizer.lr: 0.001 -> 0.0005" in last

    path = train(
        tmp, "run", "trainer.max_steps=13", f"ckpt_path={home / 'checkpoints' / 'step-00000012'}"
    ).stdout
    assert "resumed from step 12, to step 13 (bitwise" in path
    assert "checkpoints newer than step 12 were moved to" in path
    assert (home / "abandoned" / "001" / "step-00000014" / "state.ckpt").is_file()
    assert "train/loss" in (home / "abandoned" / "001" / "metrics.csv").read_text()
    assert "finished at step 13" in train(tmp, "run", "trainer.max_steps=13").stdout

    best = train(tmp, "run", "ckpt_path=best", "trainer.max_steps=13").stdout
    scores = MetricsCSV(home / "metrics.csv").column("val/loss")
    assert f"resumed from step {min(scores, key=scores.get)}," in best


def test_another_network_cannot_go_on_from_these_weights(run):
    done = train(
        run[0], "run", "backbone.depth=1", "trainer.max_steps=99", "ckpt_path=last", code=2
    )
    assert (
        "is of another network than backbone, ema or code are now of: denoiser.backbone.blocks.1."
        in done.stderr
    )
    assert "Traceback" not in done.stderr


def test_fine_tuning_starts_from_the_weights_of_another_run(run):
    tmp, _ = run
    source = tmp / "runs" / "run" / "checkpoints" / "step-00000012"
    words = ["trainer.max_steps=1", "optimizer.lr=0", "optimizer.weight_decay=0"]
    done = train(tmp, "tuned", f"init_from={source}", *words)
    assert "fresh, to step 1" in done.stdout
    assert f"init_from={source} (step 12, EMA weights): all" in done.stdout
    old, new = (load_module(tmp / "runs" / r / "checkpoints" / s / "state.ckpt") for r, s in STATES)
    for expected, found in zip(old.ema.model.parameters(), new.denoiser.parameters(), strict=True):
        assert torch.equal(expected, found)


STATES = (("run", "step-00000012"), ("tuned", "step-00000001"))


def test_sampling_is_the_same_at_every_batch_size(run):
    tmp, _ = run
    words = [
        f"paths.runs={tmp / 'runs'}",
        "run=run",
        "sample.n=4",
        "sample.label=pickup",
        "sampler.steps=3",
    ]
    ones, threes = (
        [*words, f"sample.batch_size={size}", f"sample.out={tmp / str(size)}"] for size in (1, 3)
    )
    done = run_forked(tmp, "ones", [str(ROOT / "sample.py"), *ones])
    assert done.returncode == 0, done.stderr
    threads = torch.get_num_threads()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        assert main(compose("sample", threes), threes) == 0
    torch.set_num_threads(threads)
    for k in range(4):
        one, three = (
            np.asarray(Image.open(tmp / d / f"{k:06d}.png")).astype(int) for d in ("1", "3")
        )
        assert one.std() > 5
        assert abs(one - three).max() <= 1  # the kernels round differently


@pytest.mark.slow
def test_sampling_refuses_what_is_not_there(run):
    tmp, _ = run
    for word, text in {
        "sample.label=plane": "there are: hatchback",
        "run=nobody": "run=nobody is not there; paths.runs=",
    }.items():
        words = [f"paths.runs={tmp / 'runs'}", "run=run", word]
        done = run_forked(tmp, "refused", [str(ROOT / "sample.py"), *words])
        assert done.returncode == 2
        assert text in done.stderr
