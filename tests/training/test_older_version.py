"""Runs that an older version wrote, kept as files: they are sampled from and continued."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from exact_resume.checkpoint.store import Store, load_state
from runs import ROOT, run_forked
from sturdy.training.build import load_module

OLD = ROOT / "tests" / "fixtures" / "run-8928c75"
KINDS = {
    "dit": ["backbone=dit", "backbone.width=16", "backbone.depth=1", "backbone.heads=2"],
    "unet": [
        "backbone=unet",
        "backbone.width=4",
        "backbone.multipliers=[1]",
        "backbone.attention=[True]",
        "backbone.blocks=1",
        "backbone.head_dim=4",
    ],
}
WORDS = (
    "data=folder data.image_size=16 data.batch_size=4 trainer=cpu trainer.threads=1 "
    "trainer.val_check_interval=3 "
    "callbacks.checkpoint.every_n_train_steps=6 callbacks.checkpoint.keep_last=1 "
    "callbacks.samples.n=4 "
    "callbacks.samples.every_n_steps=6 sampler.steps=2 learning_rate.warmup=2 trainer.max_steps=9"
)


@pytest.fixture(params=KINDS)
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of an older version's run."""
    return Path(shutil.copytree(OLD / request.param, tmp_path / request.param))


def go_on(run: Path, *words: str) -> subprocess.CompletedProcess[str]:
    paths = [
        f"data.root={OLD / 'images'}",
        f"paths.runs={run.parent}",
        f"paths.cache={run.parent / 'cache'}",
    ]
    words = (*WORDS.split(), f"name={run.name}", *KINDS[run.name], *paths, *words)
    return run_forked(run.parent, "train", [str(ROOT / "train.py"), *words])


def test_it_is_sampled_from(run: Path) -> None:
    words = [f"paths.runs={run.parent}", f"run={run.name}", "sample.n=2", "sampler.steps=2"]
    words = [str(ROOT / "sample.py"), *words, f"sample.out={run.parent / 'out'}"]
    done = run_forked(run.parent, "sample", words)
    assert done.returncode == 0, done.stderr
    assert len(list((run.parent / "out").glob("0*.png"))) == 2
    state = load_state(run / "checkpoints" / "step-00000006" / "state.ckpt")["state_dict"]
    module = load_module(run / "checkpoints" / "step-00000006" / "state.ckpt")
    assert all(torch.equal(weight, state[name]) for name, weight in module.state_dict().items())


def test_it_is_continued_on_purpose(run: Path) -> None:
    done = go_on(run, "ckpt_path=last")
    assert done.returncode == 0, done.stderr
    assert "resumed from step 6, to step 9" in done.stdout
    assert Store(run / "checkpoints").steps()[-1] == 9


def test_it_is_continued_by_the_same_command(run: Path) -> None:
    done = go_on(run)
    assert done.returncode == 0, done.stderr
    assert "same samples" in done.stdout
