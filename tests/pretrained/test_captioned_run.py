"""A run whose images have captions, from its training to its pictures."""

import json
import shutil

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from PIL import Image

pytest.importorskip("diffusers")

from examples.tiny_sd.build import build
from runs import ROOT, differences, train
from sturdy.cli.quoting import quote_text
from sturdy.pretrained.text_table import FOLDER
from sturdy.sampling.sample import main

COLOURS = {"bus": (200, 30, 30), "car": (30, 30, 200)}
UNET = [
    "block_out_channels:[32,32]",
    "down_block_types:[CrossAttnDownBlock2D,DownBlock2D]",
    "up_block_types:[UpBlock2D,CrossAttnUpBlock2D]",
    "sample_size:16,in_channels:3,out_channels:3,layers_per_block:1",
    "cross_attention_dim:32,attention_head_dim:8",
]
BASE = [
    "trainer=cpu",
    "trainer.threads=1",
    "trainer.max_steps=4",
    "trainer.val_check_interval=4",
    "callbacks.checkpoint.every_n_train_steps=2",
    "callbacks.samples.every_n_steps=4",
    "callbacks.samples.n=4",
    "data=folder",
    "data.image_size=16",
    "data.batch_size=4",
    "data.captions=true",
    "data.caption=a photo of a {}",
    "condition=captions",
    "backbone=borrowed",
    f"backbone.config={{{','.join(UNET)}}}",
    "schedule=scaled_linear",
    "target=noise",
    "sampler=ddim",
    "sampler.steps=2",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with images, a base, and the finished run "run"."""
    tmp = tmp_path_factory.mktemp("captioned")
    rng = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (tmp / "images" / name).mkdir(parents=True)
        for i in range(8):
            pixels = rng.integers(0, 50, (16, 16, 3)) + np.array(colour)
            image = Image.fromarray(pixels.astype(np.uint8))
            image.save(tmp / "images" / name / f"{i}.png")
    build(tmp / "base", "sd1")
    assert "2 different" in captioned(tmp, "run").stdout
    return tmp


def captioned(tmp, name, *words, code=0):
    given = [f"data.root={tmp / 'images'}", f"condition.path={tmp / 'base'}", *words]
    return train(tmp, name, *given, base=BASE, code=code)


@pytest.fixture
def drawn(home, capsys, monkeypatch):
    """Draw in this process: the exit code and what was said."""
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)

    def start(*words, cache=home / "cache"):
        words = ["run=run", f"paths.runs={home / 'runs'}", f"paths.cache={cache}", *words]
        words += ["device=cpu", "sample.n=4"]
        quoted = [quote_text(word, OverridesParser.create()) for word in words]
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            cfg = compose("sample", quoted)
        code = main(cfg, words)
        said = capsys.readouterr()
        return code, said.out + said.err

    yield start
    torch.use_deterministic_algorithms(False)


def how(folder):
    return json.loads((folder / "how.json").read_text())


def images(folder):
    return [np.array(Image.open(path)) for path in sorted(folder.glob("0*.png"))]


def test_another_prompt_is_another_folder_and_prompts_come_in_turn(home, drawn):
    prompts = ['a "red" pickup, [at night]: 50% = off', "[a red bus,'a car, at night']"]
    folders = [home / "runs" / "run" / name for name in ("pictures", "pictures-2")]
    for prompt, folder in zip(prompts, folders, strict=True):
        for _ in range(2):  # drawn, then there
            code, said = drawn(f"sample.prompt={prompt}", "guidance.scale=3")
            assert code == 0, said
            assert f"{folder};" in said or f"{folder} (" in said
    assert how(folders[0])["prompt"] == [prompts[0]]
    assert how(folders[1])["prompt"] == ["a red bus", "a car, at night"]
    alone = home / "alone"
    assert drawn("sample.prompt=a red bus", "guidance.scale=3", f"sample.out={alone}")[0] == 0
    same = [
        bool(np.abs(a.astype(int) - b).max() <= 1)  # kernels may round differently
        for a, b in zip(images(folders[1]), images(alone), strict=True)
    ]
    assert same == [True, False, True, False]


def test_without_a_prompt_the_training_captions_come_in_turn(home, drawn, tmp_path):
    out = home / "training-captions"
    code, said = drawn(f"sample.out={out}")
    assert code == 0, said
    spelled = home / "spelled"
    prompt = "[a photo of a bus,a photo of a car]"
    assert drawn(f"sample.prompt={prompt}", f"sample.out={spelled}")[0] == 0
    assert all(map(np.array_equal, images(out), images(spelled)))
    code, said = drawn(f"sample.out={home / 'gone'}", cache=tmp_path)
    assert code == 2
    assert "sample.prompt must say what to draw" in said


def test_an_image_is_drawn_anew_with_a_prompt(home, drawn):
    image = home / "images" / "bus" / "0.png"
    out = home / "anew"
    word = f"sample.image={image}"
    code, said = drawn(word, "sample.strength=0.5", "sample.prompt=a car", f"sample.out={out}")
    assert code == 0, said
    assert len(images(out)) == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sample.label=bus"], "sample.label=bus: this run was trained on captions"),
        (["sample.negative=blurry"], "sample.negative=blurry needs a text to draw"),
    ],
)
def test_options_that_make_no_sense_are_refused(drawn, words, message):
    code, said = drawn(*words)
    assert code == 2
    assert message in said


def test_other_text_encoders_are_refused(home, drawn):
    path = home / "base" / "text_encoder" / "model.safetensors"
    content = path.read_bytes()
    try:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        code, said = drawn("sample.prompt=a car")
        assert code == 2
        assert f"condition: the text encoders of {home / 'base'} are not those" in said
        refused = captioned(home, "run", "trainer.max_steps=6", code=2)
        assert "condition.key" in refused.stderr
    finally:
        path.write_bytes(content)


def test_a_run_goes_on_where_the_base_was_moved_and_the_table_is_gone(home):
    """The same as one that was never interrupted."""
    captioned(home, "whole", "trainer.max_steps=6")
    shutil.rmtree(home / "cache" / FOLDER)
    shutil.copytree(home / "base", home / "moved")
    said = captioned(home, "run", "trainer.max_steps=6", f"condition.path={home / 'moved'}").stdout
    assert "resumed from step 4, to step 6 (bitwise" in said
    assert differences(home, "whole", "run") == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.captions=false", "data.caption=null"], "condition=captions needs captions"),
        (["condition=classes"], "which only condition=captions reads: choose it"),
    ],
)
def test_captions_and_a_condition_that_do_not_go_together_are_refused(home, words, message):
    options = [] if words == ["condition=classes"] else [f"condition.path={home / 'base'}"]
    refused = train(
        home, "refused", f"data.root={home / 'images'}", *words, *options, base=BASE, code=2
    )
    assert message in refused.stderr
