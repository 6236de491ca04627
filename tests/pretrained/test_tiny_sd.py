"""examples/tiny_sd writes the same folder for the same arguments, and diffusers draws with it."""

import subprocess
import sys

import pytest
import torch

pytest.importorskip("diffusers")

import sd_layouts as layouts
from examples.tiny_sd.build import FAMILIES, build
from runs import ROOT
from sturdy.pretrained.tokenizer import read_merges


def test_the_seed_decides_the_weights(tmp_path):
    before = torch.get_rng_state()
    build(tmp_path / "a", seed=1)
    build(tmp_path / "b", seed=1)
    build(tmp_path / "c", seed=2)
    assert torch.equal(before, torch.get_rng_state())
    a, b, c = (layouts.read_folder(tmp_path / name) for name in "abc")
    for part in a:
        assert all(torch.equal(a[part][name], b[part][name]) for name in a[part])
        assert any(not torch.equal(a[part][name], c[part][name]) for name in a[part])


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_draws_with_it(tmp_path, family):
    from diffusers import DiffusionPipeline

    build(tmp_path, family)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline("a cat", num_inference_steps=1, height=64, width=64, output_type="pt").images
    assert drawn.shape == (1, 3, 64, 64)
    assert drawn.isfinite().all()


def test_the_command(tmp_path):
    command = [sys.executable, "examples/tiny_sd/build.py", tmp_path / "out", "--family", "sd2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"{tmp_path / 'out'}: sd2, random weights\n"
    assert (tmp_path / "out" / "model_index.json").is_file()


def test_refuses_another_family_and_another_vocabulary(tmp_path):
    with pytest.raises(ValueError, match="family=sd3 must be one of sd1, sd2, sdxl"):
        build(tmp_path, "sd3")
    (tmp_path / "merges.gz").write_text("no gzip")
    with pytest.raises(ValueError, match=r"merges\.gz cannot be read"):
        read_merges(tmp_path / "merges.gz")
