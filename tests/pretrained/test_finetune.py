"""Fine-tuning a whole Stable Diffusion, tiny and real: killed, moved, changed, and drawn from."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")

from exact_resume.checkpoint.store import Store, load_state
from finetuning import LIVE, LORA, STEPS, prepare
from runs import ROOT, differences, kill_at, run_script, train
from sd_layouts import write_file


@pytest.fixture(scope="module")
def tmp(tmp_path_factory):
    return tmp_path_factory.mktemp("finetune")


@pytest.fixture(scope="module")
def words(tmp):
    return prepare(tmp)


@pytest.fixture(scope="module")
def adapter(tmp, words):
    """A run of an adapter that nobody has disturbed: what it said."""
    return train(tmp, "adapter", *LORA, base=words).stdout


def state(tmp, name, step=STEPS):
    return load_state(Store(tmp / "runs" / name / "checkpoints").state(step))


def test_the_start_says_what_was_found(adapter, tmp):
    assert f"base: Stable Diffusion 1, {tmp / 'sd1'} (SHA-256 " in adapter
    assert "target noise" in adapter
    assert "captions" in adapter
    assert "latents of 20 images" in adapter


@pytest.mark.parametrize(
    "way",
    [
        LORA,
        pytest.param([], marks=pytest.mark.slow),
        pytest.param([*LORA, *LIVE], marks=pytest.mark.slow),
    ],
    ids=["adapter", "full", "live"],
)
def test_killed_it_ends_in_the_same_bits(way, tmp, words, adapter):
    name = {0: "full", 2: "adapter", 3: "live"}[len(way)]
    if name != "adapter":
        train(tmp, name, *way, base=words)
    kill_at(tmp, f"{name}-killed", 3, *way, base=words, saved=True)
    assert "bitwise" in train(tmp, f"{name}-killed", *way, base=words).stdout
    assert differences(tmp, name, f"{name}-killed") == []


def test_an_adapters_checkpoint_holds_the_adapter_alone(tmp, adapter):
    saved = state(tmp, "adapter")
    assert saved["state_dict"]
    assert all("lora_" in name for name in saved["state_dict"])
    weights = sum(t.numel() for n, t in saved["state_dict"].items() if n.startswith("denoiser."))
    file = Store(tmp / "runs" / "adapter" / "checkpoints").state(STEPS)
    assert file.stat().st_size < 5 * 4 * weights  # weights, average, and two moments


def test_the_same_base_in_another_layout_continues(tmp, words, adapter):
    kill_at(tmp, "packed", 3, *LORA, base=words, saved=True)
    (tmp / "packed").mkdir()
    file = tmp / "packed" / "model.ckpt"
    write_file(tmp / "sd1", file, "sd1", lightning=True)
    shutil.copytree(tmp / "sd1" / "tokenizer", tmp / "packed" / "tokenizer")
    there = [word if not word.startswith("base=") else f"base={file}" for word in words]
    assert "bitwise" in train(tmp, "packed", *LORA, base=there).stdout
    assert differences(tmp, "adapter", "packed") == []


def test_a_base_that_was_moved_continues_and_another_is_refused(tmp, words, adapter):
    kill_at(tmp, "moved", 3, *LORA, base=words, saved=True)
    moved = tmp / "elsewhere"
    shutil.copytree(tmp / "sd1", moved)
    there = [word if not word.startswith("base=") else f"base={moved}" for word in words]
    assert "bitwise" in train(tmp, "moved", *LORA, base=there).stdout
    assert differences(tmp, "adapter", "moved") == []

    file = moved / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    said = train(tmp, "moved", *LORA, "trainer.max_steps=8", base=there, code=2).stderr
    assert "backbone.base.sha256" in said
    shutil.rmtree(moved)
    said = train(tmp, "moved", *LORA, "trainer.max_steps=8", base=there, code=2).stderr
    assert f"base={moved}" in said
    assert "is not there" in said


def test_images_are_drawn_for_a_prompt(tmp, adapter):
    options = ["run=adapter", "sample.n=2", "sampler.steps=2", "guidance.scale=3"]
    said = run_script(tmp, "sample", *options, "sample.prompt=a red car, at night")
    assert "a red car, at night" in said
    pictures = tmp / "runs" / "adapter" / "pictures"
    assert [Image.open(p).size for p in sorted(pictures.glob("0*.png"))] == [(64, 64)] * 2

    start = ["sample.image=" + str(tmp / "images" / "00.png"), "sample.strength=0.5"]
    run_script(tmp, "sample", *options, "sample.prompt=a car", *start)
    mask = Image.new("L", (72, 64), 0)
    mask.paste(255, (0, 0, 32, 64))
    mask.save(tmp / "mask.png")
    start = [start[0], f"sample.mask={tmp / 'mask.png'}", f"sample.out={tmp / 'filled'}"]
    run_script(tmp, "sample", *options, "sample.prompt=a car", *start)
    assert len(list((tmp / "filled").glob("0*.png"))) == 2


@pytest.mark.slow
def test_a_worse_network_guides_a_captioned_run(tmp, words, adapter):
    train(tmp, "worse", *LORA, "trainer.max_steps=2", base=words)
    guide = ["guidance.scale=1.5", f"guidance.guide={tmp / 'runs' / 'worse'}", "sampler.steps=2"]
    out = f"sample.out={tmp / 'guided'}"
    run_script(tmp, "sample", "run=adapter", "sample.n=1", "sample.prompt=a car", out, *guide)
    few = ["evaluate.n=8", "evaluate.batch_size=4", "evaluate.levels=2", "evaluate.audit_seen=0"]
    out = f"evaluate.out={tmp / 'guided-report'}"
    run_script(tmp, "evaluate", "run=adapter", *few, "features.seen=8", out, *guide)


def test_a_run_is_evaluated(tmp, adapter):
    few = ["evaluate.n=8", "evaluate.batch_size=2", "evaluate.levels=2", "evaluate.audit_seen=0"]
    run_script(tmp, "evaluate", "run=adapter", *few, "features.seen=8", "sampler.steps=2")
    report = tmp / "runs" / "adapter" / "evaluation"
    assert json.loads((report / "report.json").read_text())


def test_a_prediction_that_is_not_the_bases_is_refused(tmp, words):
    said = train(tmp, "odd", "target=v", base=words, code=2).stderr
    assert "target=v" in said
    assert "Leave target out" in said


def test_a_file_that_does_not_say_what_it_predicts_is_asked_about(tmp, words):
    from examples.tiny_sd.build import build

    build(tmp / "sd2", "sd2", prediction="v_prediction")
    (tmp / "single").mkdir()
    file = tmp / "single" / "model.safetensors"
    write_file(tmp / "sd2", file, "sd2")
    shutil.copytree(tmp / "sd2" / "tokenizer", tmp / "single" / "tokenizer")
    there = [word if not word.startswith("base=") else f"base={file}" for word in words]
    said = train(tmp, "asked", base=there, code=2).stderr
    assert "target=v" in said
    assert "target=noise" in said
    said = train(tmp, "asked", "target=v", "trainer.max_steps=1", base=there).stdout
    assert "base: Stable Diffusion 2" in said
    folder = [word if not word.startswith("base=") else f"base={tmp / 'sd2'}" for word in words]
    said = train(tmp, "told", "trainer.max_steps=1", base=folder).stdout
    assert "target v" in said
    assert differences(tmp, "asked", "told") == [], "the folder and the file are one base"


def test_a_part_of_ones_own_is_refused(tmp, words):
    said = train(tmp, "odd", "backbone=dit", base=words, code=2).stderr
    assert "DiT is not of the base" in said
    said = train(tmp, "odd", "lora.alpha=4", base=words, code=2).stderr
    assert "lora.alpha=4 needs lora.rank" in said


def test_a_size_that_cannot_be_halved_is_refused(tmp, words):
    said = train(tmp, "odd", "data.image_size=72", base=words, code=2).stderr
    assert "data.image_size=72" in said
    assert "64 or 128" in said


def test_a_base_alone_chooses_the_experiment(tmp, words):
    without = [word for word in words if not word.startswith("experiment=")]
    job = [sys.executable, str(ROOT / "train.py"), *without, "--cfg", "job"]
    done = subprocess.run(job, capture_output=True, text=True, env=os.environ, check=True)
    assert "sturdy.pretrained.borrowed.Borrowed" in done.stdout


@pytest.mark.slow
def test_it_begins_from_the_weights_of_a_folder(tmp, words):
    other = tmp / "other"
    if not other.exists():
        from examples.tiny_sd.build import build

        build(other, seed=5)
    said = train(tmp, "begun", f"init_from={other}", "trainer.max_steps=1", base=words).stdout
    assert f"init_from={other}: all" in said
    again = [f"init_from={other}", "trainer.max_steps=2"]
    assert "bitwise" in train(tmp, "begun", *again, base=words).stdout
    assert "nothing to do" in train(tmp, "begun", *again, base=words).stdout
    said = train(
        tmp, "begun", f"init_from={tmp / 'sd1'}", "trainer.max_steps=3", base=words, code=2
    )
    assert "holds other weights" in said.stderr
    assert torch.isfinite(next(iter(state(tmp, "begun", 1)["state_dict"].values()))).all()


WORLDS = {"one process": [], "two": ["trainer.devices=2", "data.shards=2", "reduction=tree"]}


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("way", [[], LORA], ids=["full", "adapter"])
@pytest.mark.parametrize("latents", [[], LIVE], ids=["cached", "live"])
def test_it_is_proved(world, way, latents, tmp, words):
    more = [*WORLDS[world], *way, *latents, "trainer.max_steps=30", "trainer.val_check_interval=10"]
    paths = [f"paths.runs={tmp / 'proved'}", f"paths.cache={tmp / 'cache'}", "name=it", "kills=3"]
    more += ["callbacks.checkpoint.every_n_train_steps=4"]
    job = [sys.executable, str(ROOT / "prove.py"), *words, *more, *paths]
    shutil.rmtree(tmp / "proved", ignore_errors=True)
    done = subprocess.run(job, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PROVED: the killed run ended in the same bits" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sdxl", "sd1"])
def test_on_buckets_it_ends_in_the_same_bits(family, tmp_path):
    words = prepare(tmp_path, family)
    for k in range(0, 20, 3):
        path = tmp_path / "images" / f"{k:02}.png"
        with Image.open(path) as image:
            image.resize((60, 120)).save(path)
    words += [*LORA, "data.buckets=[64x64,96x32]"]
    if family == "sd1":
        said = train(tmp_path, "wrong", "data.buckets=[64x64,90x32]", base=words, code=2).stderr
        assert "the sides of 90x32 must be multiples of" in said
    said = train(tmp_path, "whole", base=words).stdout
    assert "cut off to fit the buckets" in said
    kill_at(tmp_path, "killed", 3, base=words, saved=True)
    assert "bitwise" in train(tmp_path, "killed", base=words).stdout
    assert differences(tmp_path, "whole", "killed") == []
    out = tmp_path / "drawn"
    prompt = ["run=whole", "sample.n=1", "sample.prompt=a car", "sample.size=96x32"]
    run_script(tmp_path, "sample", *prompt, f"sample.out={out}")
    with Image.open(out / "000000.png") as image:
        assert image.size == (32, 96)
