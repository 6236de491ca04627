"""Settings of sampling: the command wins over the run, and what makes no sense is refused."""

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import nn

from runs import ROOT, train
from sturdy.diffusion.denoiser import Denoiser
from sturdy.diffusion.sampler import DDIM
from sturdy.diffusion.schedule import RectifiedFlow
from sturdy.diffusion.target import Velocity
from sturdy.evaluation.summary import count_network_calls
from sturdy.sampling.config import SamplingConfig, resolve_sampling
from sturdy.sampling.sample import main

CONFIG = {
    "sampler": {"_target_": "sturdy.diffusion.sampler.DDIM", "steps": 5},
    "guidance": {"scale": 2.0},
}
LABELS = torch.zeros(1, dtype=torch.int64)


def command(*words, script="sample"):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose(script, ["run=any", *words])


def test_without_a_word_the_runs_config_holds():
    sampling = resolve_sampling(command(), CONFIG)
    assert isinstance(sampling.make_sampler(), DDIM)
    assert sampling.primitives(LABELS) == {**CONFIG, "ema": None}
    assert sampling.primitives(None)["guidance"] is None
    assert sampling.describe(LABELS) == (
        "drawn by DDIM (steps 5), guidance 2, the run's own EMA: from the run's config"
    )


def test_the_command_wins_over_the_run():
    words = ["sampler.steps=4", "guidance.scale=3"]
    sampling = resolve_sampling(command(*words), CONFIG, ema=0.1)
    assert sampling.describe(LABELS) == (
        "drawn by DDIM (steps 4), guidance 3, an EMA of length 0.1: from the run's config, but for "
        "sampler.steps, guidance.scale, the EMA"
    )
    another = resolve_sampling(command("sampler=euler"), CONFIG)
    assert another.sampler["_target_"].endswith("Euler"), "none of the run's arguments"
    assert another.sampler["steps"] == 50
    assert another.origin.endswith("but for sampler")


REFUSED = {
    "steps=0": ({"sampler": {"steps": 0}}, "sampler.steps=0 must be 1 or more"),
    "no sampler": (
        {"sampler": {"_target_": "sturdy.diffusion.schedule.Linear"}},
        "sampler=sturdy.diffusion.schedule.Linear is no sampler",
    ),
    "no number": ({"guidance": {"scale": "high"}}, "guidance.scale=high must be a number"),
    "no guide": (
        {"guidance": {"guide": "gone"}},
        "guidance.guide=gone is not there; give the directory of a run",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused_with_its_key(name):
    given, answer = REFUSED[name]
    with pytest.raises(ValueError, match=answer):
        resolve_sampling(OmegaConf.create(given), CONFIG).make_sampler()


@pytest.mark.parametrize(
    "node", [{"_target_": "os.system", "command": "ls"}, {"steps": [{"_target_": "os.getpid"}]}]
)
def test_a_runs_config_chooses_no_foreign_code(node):
    config = {**CONFIG, "sampler": {**CONFIG["sampler"], **node}}
    with pytest.raises(ValueError, match=r"the checkpoint asks for os\..* is not run"):
        resolve_sampling(command(), config)


@pytest.mark.parametrize(
    ("scale", "labels", "guide", "calls"),
    [(1.0, LABELS, False, 3), (2.0, LABELS, False, 6), (2.0, None, False, 3), (2.0, None, True, 6)],
)
def test_network_calls_of_an_image(scale, labels, guide, calls):
    network = Denoiser(nn.Identity(), RectifiedFlow(), Velocity(), num_classes=3)
    guidance = {"scale": scale} | ({"guide": "a checkpoint"} if guide else {})
    sampling = SamplingConfig({**CONFIG["sampler"], "steps": 3}, guidance)
    found = count_network_calls(sampling, network, labels, guided_by_network=guide)
    assert found == calls


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("guide")
    train(tmp, "run", "optimizer.lr=0.02", "callbacks.samples.every_n_steps=null")
    return tmp / "runs" / "run"


def test_a_guide_is_a_checkpoint_or_the_last_of_a_run(home, tmp_path, capsys, monkeypatch):
    """Guidance away from the network itself changes nothing."""
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    first = min((home / "checkpoints").glob("step-*"))
    given = {
        "none": "guidance.scale=1",
        "itself": f"guidance.guide={home}",
        "earlier": f"guidance.guide={first}",
        "null label": "guidance.scale=3",
    }
    common = [f"paths.runs={home.parent}", "run=run", "device=cpu", "sample.n=2"]
    common += ["sampler=ddim", "sampler.steps=3", "guidance.scale=3"]
    said = {}
    for name, word in given.items():
        words = [*common, f"sample.out='{tmp_path / name}'", word]
        code = main(command(*words), words)
        printed = capsys.readouterr()
        said[name] = printed.out + printed.err
        assert code == 0, said[name]
    torch.use_deterministic_algorithms(False)
    images = {name: (tmp_path / name / "000001.png").read_bytes() for name in given}
    assert images["none"] == images["itself"]
    assert len(set(images.values())) == 3
    assert f"guidance 3 away from {first / 'state.ckpt'}, the run's own EMA" in said["earlier"]


def test_an_older_versions_defaults_are_named_and_not_read(home, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    file = home / "sampling.yaml"
    file.write_text("guidance: {scale: 7}")
    words = [f"paths.runs={home.parent}", "run=run", "device=cpu", "sample.n=1"]
    words.append(f"sample.out={tmp_path}")
    assert main(command(*words), words) == 0
    said = capsys.readouterr().out
    file.unlink()
    torch.use_deterministic_algorithms(False)
    assert f"{file} of an older version is not read any more" in said
    assert "guidance 7" not in said
