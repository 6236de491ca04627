"""A caption is a label: the table of its embeddings, and the condition that reads it."""

import copy
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from exact_resume.randomness import Draws
from examples.tiny_sd.build import build
from sturdy.diffusion import DDIM, Denoiser, Guided, Objective, RectifiedFlow, Velocity
from sturdy.evaluation.reference import classes_of_captions
from sturdy.pretrained.captions import Captions
from sturdy.pretrained.text_encoders import TextEncoders
from sturdy.pretrained.text_table import FOLDER, TextTable, find_table
from sturdy.sampling.grid_callback import SampleGrids

TEXTS = ["a red pickup", "a blue bus, at night", 'a "yellow": taxi']
LONG = "a very long text " * 9  # 153 letters; a token of the tiny tokenizer is a letter
FAMILIES = ("sd1", "sd2", "sdxl")
SIZE = 64


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    for family in FAMILIES:
        build(folder / family, family)
    return folder


def captions(base, root, texts=TEXTS, **options):
    made = Captions(base, image_size=SIZE, **options)
    made.prepare(texts, root)
    return made


def arguments(option, *labels, rows=None):
    rows = len(option.table) if rows is None else rows
    return option(torch.tensor(labels), rows).arguments()


def by_diffusers(base, prompt):
    """Embeddings, null embeddings, and for SDXL the pooled ones, as the pipeline makes them."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(base, local_files_only=True)
    with torch.no_grad():
        found = pipeline.encode_prompt(
            prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
        )
    return [part.half().float() for part in found]


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_a_row_is_what_the_pipeline_of_diffusers_makes_of_that_caption(bases, tmp_path, family):
    option = captions(bases / family, tmp_path, [*TEXTS, LONG])
    for row, text in enumerate([*TEXTS, LONG]):
        expected, null = by_diffusers(bases / family, text)
        (embeddings,) = arguments(option, row, len(option.table))
        assert embeddings.shape == (2, 77, 32)
        assert embeddings.dtype == torch.float32
        assert torch.equal(embeddings, torch.cat([expected, null]))


def test_sdxl_gets_two_encoders_the_pooled_text_and_six_sizes(bases, tmp_path):
    option = captions(bases / "sdxl", tmp_path)
    expected, null, pooled, null_pooled = by_diffusers(bases / "sdxl", TEXTS[1])
    embeddings, vector, sizes = arguments(option, 1, 3)
    assert torch.equal(embeddings, torch.cat([expected, null]))
    assert torch.equal(vector, torch.cat([pooled, null_pooled]))
    assert not null.any(), "SDXL was trained with zeros where the caption was left out"
    assert sizes.tolist() == [[SIZE, SIZE, 0, 0, SIZE, SIZE]] * 2
    wide = option(torch.tensor([1, 3]), 3).sized(48, 80)
    for cond in (wide, wide.null(), wide.cat(wide)[:2]):
        assert cond.arguments()[2].tolist() == [[48, 80, 0, 0, 48, 80]] * 2


def test_an_empty_prompt_of_sdxl_is_no_null_caption(bases, tmp_path):
    option = captions(bases / "sdxl", tmp_path, ["", "a dog"])
    embeddings, pooled, _ = arguments(option, 0, 2)
    assert embeddings[0].any()
    assert pooled[0].any()
    assert not embeddings[1].any()
    assert not pooled[1].any()


def test_the_null_caption_may_be_a_negative_prompt(bases, tmp_path):
    for family in FAMILIES:
        option = Captions(bases / family, image_size=SIZE)
        option.prepare(["a dog", "blurry"], tmp_path, null="blurry")
        for argument in arguments(option, 1, 2):
            assert torch.equal(argument[0], argument[1])


def test_the_bits_of_a_row_do_not_depend_on_its_neighbours(bases, tmp_path):
    many = captions(bases / "sd1", tmp_path, TEXTS)
    for row, text in enumerate(TEXTS):
        alone = captions(bases / "sd1", tmp_path / "alone", [text])
        assert torch.equal(arguments(many, row)[0], arguments(alone, 0)[0])


def test_the_table_is_made_once_and_the_encoders_are_freed(bases, tmp_path):
    from transformers import CLIPTextModel

    def alive():
        gc.collect()
        return sum(type(found) is CLIPTextModel for found in gc.get_objects())

    before = alive()
    first = captions(bases / "sd1", tmp_path)
    assert alive() == before
    made = first.table.path.stat().st_mtime_ns
    second = captions(bases / "sd1", tmp_path)
    assert second.table.path == first.table.path
    assert second.table.path.stat().st_mtime_ns == made
    assert second.digest == first.digest
    assert second.key() == first.key()
    kept = CLIPTextModel.from_pretrained(bases / "sd1" / "text_encoder")
    assert alive() == before + 1, "control: a network that is kept is seen"
    del kept


def test_nothing_random_is_drawn(bases, tmp_path):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    captions(bases / "sd1", tmp_path)
    assert torch.equal(torch.rand(3), expected)


def changed_copy(base, tmp_path, file, change):
    """A copy of ``base`` of which one file was changed."""
    other = tmp_path / "changed"
    shutil.copytree(base, other)
    path = other / file
    path.write_bytes(change(path.read_bytes()))
    return other


def with_another_byte(content):
    return content[:-1] + bytes([content[-1] ^ 1])


def with_other_heads(content):
    return json.dumps(json.loads(content) | {"num_attention_heads": 2}).encode()


def with_swapped_letters(content):
    tokenizer = json.loads(content)
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    return json.dumps(tokenizer).encode()


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("text_encoder/model.safetensors", with_another_byte),
        ("text_encoder/config.json", with_other_heads),
        ("tokenizer/tokenizer.json", with_swapped_letters),
    ],
)
def test_another_encoder_or_tokenizer_is_another_key_and_table(bases, tmp_path, file, change):
    ours = captions(bases / "sd1", tmp_path)
    other = captions(changed_copy(bases / "sd1", tmp_path, file, change), tmp_path)
    assert other.key() != ours.key()
    assert other.table.path != ours.table.path


def test_a_copy_elsewhere_and_files_that_do_not_matter_are_the_same_key(bases, tmp_path):
    ours = captions(bases / "sd1", tmp_path)
    unet = "unet/diffusion_pytorch_model.safetensors"
    moved = captions(changed_copy(bases / "sd1", tmp_path, unet, with_another_byte), tmp_path)
    assert moved.key() == ours.key()
    assert moved.table.path == ours.table.path


def test_other_captions_or_another_order_are_another_table_of_the_same_key(bases, tmp_path):
    ours = captions(bases / "sd1", tmp_path)
    for texts in (TEXTS[::-1], TEXTS[:2], [*TEXTS[:2], "a 'yellow': taxi"]):
        other = captions(bases / "sd1", tmp_path, texts)
        assert other.digest != ours.digest
        assert other.table.path != ours.table.path
        assert other.key() == ours.key()
    assert find_table(tmp_path, ours.digest).captions == TEXTS
    assert find_table(tmp_path, "of another run") is None


def test_other_weights_than_the_expected_ones_are_refused(bases, tmp_path):
    found = TextEncoders(bases / "sdxl").sha256
    assert found.count("+") == 1
    assert captions(bases / "sdxl", tmp_path, sha256=found).digest
    file = "text_encoder_2/model.safetensors"
    other = changed_copy(bases / "sdxl", tmp_path, file, with_another_byte)
    with pytest.raises(ValueError, match="expected") as refused:
        captions(other, tmp_path, sha256=found)
    first, second = found.split("+")
    assert all(word in str(refused.value) for word in (str(other), first, second))


def test_a_truncated_encoder_is_refused_by_name(bases, tmp_path):
    file = "text_encoder/model.safetensors"
    other = changed_copy(bases / "sd1", tmp_path, file, lambda content: content[:-100])
    with pytest.raises(ValueError, match=r"text_encoder/model\.safetensors"):
        captions(other, tmp_path)
    assert not list((tmp_path).glob(f"{FOLDER}/*/manifest.json"))


def test_captions_that_are_cut_are_counted(bases, tmp_path):
    fits = "x" * 75  # and the marks of start and end
    assert captions(bases / "sd1", tmp_path, [fits]).notes == []
    for _ in range(2):  # made, then loaded
        (line,) = captions(bases / "sd1", tmp_path, [fits, fits + "x", LONG]).notes
        assert line.startswith("2 of 3 captions have more than 77 tokens")
        assert fits in line


BUILD = """
import sys, time
from pathlib import Path
from sturdy.pretrained import text_encoders
from sturdy.evaluation.reference import classes_of_captions
from sturdy.pretrained.captions import Captions

encode = text_encoders.encode

def slow(*arguments):
    time.sleep(0.1)
    return encode(*arguments)

text_encoders.encode = slow
texts = [f"caption {i}" for i in range(int(sys.argv[3]))]
Captions(sys.argv[1], image_size=64).prepare(texts, Path(sys.argv[2]))
"""


def test_a_kill_while_the_table_is_made_leaves_nothing_half(bases, tmp_path):
    texts = [f"caption {i}" for i in range(60)]
    command = [sys.executable, "-c", BUILD, str(bases / "sd1"), str(tmp_path / "killed"), "60"]
    process = subprocess.Popen(command)
    growing = tmp_path / "killed" / FOLDER
    while not any(file.stat().st_size for file in growing.glob("*.building/embeddings.npy")):
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert list(growing.glob("*.building")), "it was killed in the middle"
    assert not list(growing.glob("*/manifest.json"))
    again = captions(bases / "sd1", tmp_path / "killed", texts)
    whole = captions(bases / "sd1", tmp_path / "whole", texts)
    assert again.digest == whole.digest
    assert not list(growing.glob("*.building"))
    for name in ("embeddings.npy", "captions.json"):
        assert (again.table.path / name).read_bytes() == (whole.table.path / name).read_bytes()


@pytest.mark.parametrize("name", ["embeddings.npy", "manifest.json", "captions.json"])
def test_a_damaged_table_is_made_again(bases, tmp_path, name, caplog):
    table = captions(bases / "sd1", tmp_path).table
    content = (table.path / name).read_bytes()
    (table.path / name).write_bytes(content[:-7])
    with pytest.raises((ValueError, OSError)):
        TextTable(table.path)
    assert captions(bases / "sd1", tmp_path).digest == table.digest
    assert "damaged" in caplog.text
    assert (table.path / name).read_bytes() == content


def test_labels_out_of_range_and_what_does_not_go_together_are_refused(bases, tmp_path):
    option = Captions(bases / "sd1", image_size=SIZE)
    assert option.digest == ""
    with pytest.raises(RuntimeError, match="prepare"):
        option(torch.tensor([0]), 3)
    option.prepare(TEXTS, tmp_path)
    for label in (-1, 4):
        with pytest.raises(ValueError, match=f"label {label} is out of range: 3 captions"):
            option(torch.tensor([0, label]), 3)
    with pytest.raises(ValueError, match="augmentation"):
        option(torch.tensor([0]), 3, torch.zeros(1, 2))
    with pytest.raises(ValueError, match="nowhere"):
        Captions(tmp_path / "nowhere", image_size=SIZE).prepare(TEXTS, tmp_path)


def test_the_null_row_alone_is_enough_for_a_call_without_a_condition(bases, tmp_path):
    option = captions(bases / "sd1", tmp_path, [])
    denoiser = Denoiser(Reader(), RectifiedFlow(), Velocity(), 3, make_condition=option)
    x_t, t = torch.randn(2, 3, 8, 8), torch.rand(2)
    assert denoiser(x_t, t).shape == x_t.shape
    _, null = by_diffusers(bases / "sd1", "a dog")
    assert torch.equal(denoiser.backbone.seen[0], null.expand(2, -1, -1))


class Reader(nn.Module):
    """A backbone that reads embeddings, and keeps them."""

    def __init__(self):
        super().__init__()
        self.read = nn.Linear(32, 3)
        self.seen = []

    def forward(self, x, t, embeddings):
        self.seen.append(embeddings)
        return x * t[:, None, None, None] + self.read(embeddings).mean(1)[:, :, None, None]


def denoiser_of(option, rows=3):
    torch.manual_seed(0)
    return Denoiser(Reader(), RectifiedFlow(), Velocity(), rows, make_condition=option)


def test_label_drop_is_caption_dropout_at_its_rate(bases, tmp_path):
    denoiser = denoiser_of(captions(bases / "sd1", tmp_path))
    n = 1000
    draws = Draws(3, range(n))
    labels = torch.arange(n) % 3
    Objective(label_drop=0.2)(denoiser, torch.zeros(n, 3, 4, 4), labels, draws)
    table = denoiser.make_condition.table
    (null,) = arguments(denoiser.make_condition, 3)
    dropped = (denoiser.backbone.seen[0] == null).all(2).all(1)
    assert torch.equal(dropped, draws.uniform("label drop") < 0.2)
    assert 0.17 < dropped.float().mean() < 0.23
    kept = ~dropped
    assert torch.equal(denoiser.backbone.seen[0][kept], table.rows(labels[kept])[0])


@pytest.mark.parametrize("rows", [2, 3, 50])
def test_guidance_with_a_prompt_is_two_plain_calls(bases, tmp_path, rows):
    """Also if there are more or fewer captions in training than prompts."""
    option = captions(bases / "sd1", tmp_path)
    denoiser = denoiser_of(option, rows)
    x_t, t = torch.randn(3, 3, 8, 8), torch.tensor([0.2, 0.5, 0.9])
    cond = option(torch.tensor([2, 0, 1]), 3)
    plain, null = denoiser(x_t, t, cond), denoiser(x_t, t, cond.null())
    assert torch.equal(null, denoiser(x_t, t)), "no condition is the null caption"
    assert not torch.allclose(plain, null)
    guided = Guided(denoiser, 4.0)(x_t, t, cond)
    torch.testing.assert_close(guided, null + 4 * (plain - null))


def test_a_network_and_its_average_share_one_table(bases, tmp_path):
    option = Captions(bases / "sd1", image_size=SIZE)
    denoiser = denoiser_of(option)
    average = copy.deepcopy(denoiser)
    option.prepare(TEXTS, tmp_path)
    assert average.make_condition is option
    assert average(torch.zeros(1, 3, 8, 8), torch.ones(1), torch.tensor([1])).isfinite().all()
    assert "make_condition" not in "".join(denoiser.state_dict())


def test_a_grid_shows_captions_that_are_spread_over_all(bases):
    grids = SampleGrids(directory="", sampler=DDIM(2), image_size=8, n=3)
    ours = SimpleNamespace(denoiser=denoiser_of(Captions(bases / "sd1", image_size=SIZE)))
    classes = SimpleNamespace(denoiser=Denoiser(Reader(), RectifiedFlow(), Velocity(), 10))
    assert grids._labels(ours, 10).tolist() == [0, 3, 6]
    assert grids._labels(ours, 2).tolist() == [0, 1, 0]
    assert grids._labels(classes, 10).tolist() == [0, 1, 2], "as it always was"


def test_a_caption_has_a_class_where_all_its_images_do():
    rows, classes = torch.tensor([0, 2, 0, 3]), torch.tensor([1, 0, 1, 1])
    assert classes_of_captions(rows, classes, 3).tolist() == [1, -1, 0, 1]
    assert classes_of_captions(rows, torch.tensor([1, 0, 0, 1]), 3) is None
