"""Requests to a run with captions: prompts, in latents, through an adapter."""

import pytest
from hydra import compose, initialize_config_dir

pytest.importorskip("diffusers")

from finetuning import LORA, prepare
from runs import ROOT, run_script, train
from sturdy.sampling.loaded_run import open_run
from sturdy.serving.checkpoint import CheckpointSampler
from sturdy.serving.words import Words

REQUESTS = [
    Words(seed=1, prompt="a red car", steps=2, guidance=3.0),
    Words(seed=1, prompt="a blue bus, at night", steps=2, guidance=3.0),
    Words(seed=1, prompt="a red car", negative="night", steps=2, guidance=3.0),
    Words(seed=2, prompt="a red car", steps=2, guidance=3.0),
]


@pytest.fixture(scope="module")
def tmp(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("prompts")
    few = ["trainer.max_steps=2", "trainer.val_check_interval=2"]
    train(tmp, "tiny", *prepare(tmp), *LORA, *few, base=[])
    return tmp


@pytest.fixture(scope="module")
def sampler(tmp):
    given = [f"paths.runs={tmp / 'runs'}", "run=tiny", "device=cpu"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("serve", given)
    return CheckpointSampler(cfg, open_run(cfg))


def test_prompts_are_drawn_together_with_the_bytes_of_sample(tmp, sampler):
    files = sampler.draw(REQUESTS)
    assert len(set(files)) == len(files)
    assert [sampler.draw([words])[0] for words in REQUESTS] == files
    for number in (1, 2):
        words = REQUESTS[number]
        given = [f"sample.seed={words.seed}", f"sample.prompt={words.prompt}"]
        if words.negative:
            given.append(f"sample.negative={words.negative}")
        given += ["sampler.steps=2", "guidance.scale=3", "sample.n=1", "device=cpu"]
        out = tmp / f"out-{number}"
        run_script(tmp, "sample", "run=tiny", f"sample.out={out}", *given)
        assert (out / "000000.png").read_bytes() == files[number]


def test_words_that_do_not_fit_the_run_are_refused(sampler):
    with pytest.raises(ValueError, match="prompt must say what to draw"):
        sampler.check(Words())
    with pytest.raises(ValueError, match="label: this run was trained on captions"):
        sampler.check(Words(label="car", prompt="a car"))
