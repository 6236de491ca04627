"""What the user is told: near misses, refused keys, refusals of a changed run; by the text."""

import json
import subprocess
import sys

import pytest

from runs import ROOT, train

MISTAKES = {
    "data.batchsize=8": "there is no key 'data.batchsize'. Did you mean data.batch_size",
    "experiment=carz": "there is no such experiment. Did you mean cars?",
    "sampler=heum": "there is no such sampler. Did you mean heun?",
    "sampelr=heun": "Did you mean sampler",
    "+backbone.widht=3": "takes no 'widht'. Did you mean width?",
    "+trainer.foo=1": "lightning.Trainer takes no 'foo'",
    "data=folder": "data.root must be given: data.root=...",
    "data.batch_size=many": "data.batch_size is a int like 64, not a word",
    "trainer.max_epochs=3": "trainer.max_epochs is refused: training counts steps: use trainer.max_steps",
    "+trainer.accumulate_grad_batches=2": "refused: use data.shards",
    "trainer.fast_dev_run=true": "refused: use debug=default",
    "trainer.limit_train_batches=2": "refused: use trainer.max_steps",
}


@pytest.mark.parametrize("word", MISTAKES)
def test_mistakes_are_answered(word):
    done = subprocess.run([sys.executable, ROOT / "train.py", word], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert MISTAKES[word] in done.stderr
    assert "Traceback" not in done.stderr


def test_mistakes_and_help_import_neither_torch_nor_lightning():
    for word in ("data.batchsize=8", "--help", "+trainer.foo=1"):
        command = [sys.executable, "-X", "importtime", str(ROOT / "train.py"), word]
        lines = subprocess.run(command, capture_output=True, text=True, timeout=60).stderr.splitlines()
        imported = {line.rsplit("|", 1)[-1].strip() for line in lines if line.startswith("import time:")}
        assert "hydra" in imported
        assert not imported & {"torch", "lightning", "sturdy.training.run"}


@pytest.mark.slow
def test_a_run_speaks_of_its_state(tmp_path):
    """Fresh, finished, refused with the difference, continued on purpose, best and abandoned, null: one run's life."""
    assert "fresh, to step 12" in train(tmp_path, "run").stdout
    assert "finished at step 12" in train(tmp_path, "run").stdout
    refused = train(tmp_path, "run", "optimizer.lr=0.5", "trainer.max_steps=14", code=2)
    assert "optimizer.lr: 0.001 -> 0.5" in refused.stderr
    assert "ckpt_path=last" in refused.stderr
    assert "starts afresh, but" in train(tmp_path, "run", "ckpt_path=null", code=2).stderr
    assert "is not there" in train(tmp_path, "run", "ckpt_path=nowhere", code=2).stderr
    assert "has no checkpoint" in train(tmp_path, "new", "ckpt_path=last", code=2).stderr

    purpose = train(tmp_path, "run", "optimizer.lr=0.0005", "trainer.max_steps=14", "ckpt_path=last").stdout
    assert "resumed from step 12" in purpose
    assert "you asked to continue" in purpose
    early = tmp_path / "runs" / "run" / "checkpoints" / "step-00000012"
    back = train(tmp_path, "run", "trainer.max_steps=13", f"ckpt_path={early}").stdout
    assert "were moved to" in back
    assert (tmp_path / "runs" / "run" / "abandoned" / "001" / "step-00000014").is_dir()

    environment = json.loads((tmp_path / "runs" / "run" / "attempts" / "001" / "environment.json").read_text())
    assert environment["stack"]["threads"] == "1"


@pytest.mark.slow
def test_sampling_starts_from_the_same_noise_at_every_batch_size(tmp_path):
    import numpy as np
    from PIL import Image

    train(tmp_path, "run")
    for size in (1, 3):
        words = [f"paths.runs={tmp_path / 'runs'}", "run=run", "sample.n=4", "sample.label=pickup", "sampler.steps=3"]
        words += [f"sample.batch_size={size}", f"sample.out={tmp_path / str(size)}"]
        subprocess.run([sys.executable, ROOT / "sample.py", *words], check=True, capture_output=True, timeout=120)
    for k in range(4):
        one, three = (np.asarray(Image.open(tmp_path / d / f"{k:06d}.png")).astype(int) for d in ("1", "3"))
        assert one.std() > 5
        assert abs(one - three).max() <= 2
