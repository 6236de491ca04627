"""No door executes a file of weights: base=, init_from=, space.path= and show."""

import os

import pytest
import torch

pytest.importorskip("diffusers")

from exact_resume.weights_file import open_weights
from runs import ROOT, fork
from sd_layouts import ldm_state, read_folder
from sturdy.pretrained.base import open_base
from sturdy.pretrained.latents import Latents
from sturdy.training.init_from import find_source
from untrusted_files import Calls


@pytest.fixture
def malicious(tmp_path):
    """A checkpoint that looks like Stable Diffusion; whoever executes it writes ``canary``."""
    from examples.tiny_sd.build import build

    build(tmp_path / "sd")
    path = tmp_path / "evil.ckpt"
    canary = tmp_path / "canary"
    content = {"state_dict": ldm_state(read_folder(tmp_path / "sd"), "sd1")}
    torch.save(content | {"callbacks": Calls(os.system, f"touch {canary}")}, path)
    return path, canary


def test_control_the_file_is_malicious(malicious):
    path, canary = malicious
    torch.load(path, weights_only=False)
    assert canary.exists()


@pytest.mark.parametrize(
    "open_it",
    [
        open_weights,
        open_base,
        lambda path: Latents(path=str(path)).key(),
        lambda path: find_source(str(path), path.parent / "runs"),
    ],
    ids=["open_weights", "base", "space", "init_from"],
)
def test_it_is_refused_by_name_and_not_executed(open_it, malicious):
    path, canary = malicious
    with pytest.raises(ValueError, match=r"evil\.ckpt.*system"):
        open_it(path)
    assert not canary.exists()


@pytest.mark.parametrize("key", ["base", "init_from", "space.path"])
def test_commands_refuse_it_in_a_line(key, malicious, tmp_path):
    path, canary = malicious
    words = {
        "base": ["experiment=finetune", f"base={path}", f"data.root={tmp_path}"],
        "init_from": ["backbone.width=8", "backbone.head_dim=8", f"init_from={path}"],
        "space.path": ["space=latents", f"space.path={path}"],
    }[key]
    small = ["trainer=cpu", "trainer.max_steps=1", "data.source.n=20", "data.image_size=16"]
    if key == "base":
        small = small[:2]
    paths = [f"paths.runs={tmp_path / 'runs'}", f"paths.cache={tmp_path / 'cache'}"]
    process, out, err = fork(tmp_path, "it", [str(ROOT / "train.py"), *paths, *small, *words])
    process.join(200)
    said = out.read_text() + err.read_text()
    assert process.exitcode == 2, said
    assert "evil.ckpt" in said
    assert "system" in said
    assert "Traceback" not in said
    assert not canary.exists()
