"""The command line takes what people type: free text, parts that are switched off, and slips."""

import itertools
import os
import random
import subprocess
import sys
from contextlib import suppress

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf

from runs import ROOT
from sturdy.cli.main import UsageError, compose_run
from sturdy.cli.overrides import flatten
from sturdy.cli.quoting import quote_text, split_values
from sturdy.cli.sweep_plan import plan_jobs
from sturdy.errors import ConfigError
from sturdy.training.settings import check_settings, local_world_size


def composed(script, *words):
    return compose_run(ROOT / "conf" / f"{script}.yaml", list(words))


def value(word, script="train"):
    """What ``key=...`` comes to, ``run`` and a folder being given."""
    given = {
        "train": ["data=folder", "data.root=/x"],
        "sample": ["run=x"],
        "evaluate": ["run=x"],
        "export": ["run=x", "to=lora"],
    }[script]
    return OmegaConf.select(composed(script, *given, word), word.split("=")[0])


TYPED = [
    "/mnt/zoë",
    "/mnt/фото",
    "/mnt/photos (1)",
    "/mnt/Smith, J",
    "/mnt/class=cat",
    "/mnt/it's",
    "/mnt/a&b",
    "/mnt/a#b",
    "[2024]_trip",
    "./set_{1}",
    "$HOME/x",
    "a${b",
    "C:\\Users\\me\\",
    "choice(a,b)",
    "a,b",
    "{a:1}",
    "2024",
    "1e3",
    "true",
    "null",
    " x ",
]


@pytest.mark.parametrize("text", TYPED)
def test_text_arrives_as_it_was_typed(text):
    assert value(f"data.root={text}") == text


@pytest.mark.parametrize(
    "name", ["2024", "1e3", "true", "null", "été", "a=b", "lr 1e-4, bs 64", "cars/label"]
)
def test_a_name_is_text(name):
    assert value(f"name={name}") == name


@pytest.mark.parametrize(
    ("typed", "label"),
    [
        ("crème", "crème"),
        ("true", "true"),
        ("1e3", "1e3"),
        ("01", "01"),
        ("1", 1),
        ("a,b (2)", "a,b (2)"),
        ("null", None),
    ],
)
def test_a_label_is_a_name_or_a_number(typed, label):
    found = value(f"sample.label={typed}", "sample")
    assert found == label
    assert type(found) is type(label)


PIECES = [
    *"ab1 .,;:'\"\\/()[]{}=+-~&#@!?*%^|<>`$é😀\n\t_",
    "${",
    "null",
    "true",
    "1e3",
    "\\'",
    "\\\\",
]


def test_any_text_composes_to_itself():
    """All short texts and many long ones; what is quoted or filled in on purpose is left out."""
    parser, rng = OverridesParser.create(), random.Random(0)
    short = itertools.chain.from_iterable(itertools.product(PIECES, repeat=n) for n in range(3))
    long = (rng.choices(PIECES, k=rng.randint(3, 12)) for _ in range(500))
    for text in map("".join, itertools.chain(short, long)):
        if (
            ("${" in text and "}" in text)
            or "\\${" in text
            or (text[:1] in ("'", '"') and text[-1:] == text[:1])
        ):
            continue
        word = quote_text(f"name={text}", parser)
        assert OmegaConf.create({"name": parser.parse_override(word).value()}).name == text, word
        assert quote_text(word, parser) == word  # a job of a sweep reads it again


def test_control_hydra_alone_does_not_read_them():
    parser = OverridesParser.create()
    with pytest.raises(HydraException, match="ë"):
        parser.parse_override("data.root=/mnt/zoë")
    assert parser.parse_override("name=2024").value() == 2024


def test_what_is_quoted_filled_in_or_a_list_is_read_as_before(monkeypatch):
    monkeypatch.setenv("PLACE", "/there")
    assert value("data.root='/x (1)'") == value('data.root="/x (1)"') == "/x (1)"
    assert value("data.root=${oc.env:PLACE}/x") == "/there/x"
    assert value("data.root=[/a b,'/c,d',~/é]") == ["/a b", "/c,d", os.path.expanduser("~/é")]
    assert value("data.root=/x") == "/x"
    assert value("trainer.max_steps=1e5") == 100_000
    assert value("ckpt_path=null") is None
    with pytest.raises(UsageError, match=r"data\.root: .*NO_SUCH"):
        value("data.root=${oc.env:NO_SUCH}")


@pytest.mark.parametrize(
    ("script", "key"),
    [
        *(
            ("train", key)
            for key in ("data.root", "paths.runs", "paths.cache", "init_from", "ckpt_path")
        ),
        *(
            ("sample", key)
            for key in ("sample.out", "sample.image", "sample.mask", "guidance.guide", "paths.runs")
        ),
        *(
            ("evaluate", key)
            for key in ("evaluate.out", "data_root", "ckpt_path", "guidance.guide")
        ),
        *(("export", key) for key in ("out", "base.path", "paths.runs")),
    ],
)
def test_the_home_directory_is_put_in_every_path(script, key):
    assert value(f"{key}=~/a b", script) == os.path.expanduser("~/a b")


def test_paths_made_of_others_have_it_too():
    cfg = composed(
        "train",
        "paths.runs=~/r",
        "paths.cache=~/c",
        "alignment=torchscript",
        "alignment.encoder.path=~/e.pt",
    )
    assert cfg.callbacks.samples.directory == os.path.expanduser("~/r/default/samples")
    assert cfg.data.cache == os.path.expanduser("~/c")
    assert cfg.alignment.encoder.path == os.path.expanduser("~/e.pt")


def test_a_sweep_parts_values_at_commas_outside_quotes():
    jobs = plan_jobs(
        ROOT / "conf" / "train.yaml", ["data=folder", "data.root=/a (1),'/b,c',~/é", "name=2024"]
    )
    roots = [composed("train", *job.words).data.root for job in jobs]
    assert roots == ["/a (1)", "/b,c", os.path.expanduser("~/é")]
    assert all(job.name.startswith("2024/data.root-") for job in jobs)
    assert split_values("a,'b,c',[d,e],") == ["a", "'b,c'", "[d,e]", ""]
    assert split_values("it's,b's") == ["it's", "b's"]


def test_a_key_that_an_option_demands_chooses_it():
    assert composed("train", "data.root=/x").data._target_.endswith("folder_data")
    assert composed("train", "experiment=cars", "data.root=/x").data.root == "/x"
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", "data.root=/nowhere/at/all"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "data=folder" in done.stdout
    assert "data.root=/nowhere/at/all does not exist" in done.stderr


OFF = {
    "callbacks.samples=null": ("callbacks.samples", None),
    "callbacks.samples=false": ("callbacks.samples", None),
    "~callbacks.guard": ("callbacks.guard", None),
    "callbacks.progress=null": ("callbacks.progress", None),
    "callbacks.watchdog=null": ("callbacks.watchdog", None),
    "logger=null": ("logger", {}),
    "alignment=null": ("alignment", None),
    "experiment=null": ("name", "default"),
}


@pytest.mark.parametrize("word", OFF)
def test_a_part_is_switched_off(word):
    key, expected = OFF[word]
    cfg = composed("train", word)
    assert OmegaConf.select(cfg, key) == expected
    check_settings(cfg)


MISTAKES = {
    "name=": "name is empty",
    "name=.": "name=. must be a directory's name in paths.runs",
    "name=..": "must be a directory's name",
    "name=x/../../../evil": "must be a directory's name",
    "name=/evil": "must be a directory's name",
    "name=x/": "must be a directory's name",
    "paths.runs=": "paths.runs is empty",
    "ema=null": "ema.decay=0",
    "sampler=null": "callbacks.samples=null",
    "callbacks=none": "switch them off one by one, such as callbacks.samples=null",
    "callbacks.early_stopping=10": "callbacks.early_stopping.patience",
    "callbacks.samples=true": "callbacks.samples.every_n_steps",
    "++callbacks.samples=10": "callbacks.samples is no value of its own",
    "resume=true": "resume is no value of its own",
    "resume=null": "resume is no value of its own",
    "~name": "a key cannot be taken away",
    "~data": "a key cannot be taken away",
    "+seed=1": "leave the + out",
    "backbone.heads=2": "backbone=dit has backbone.heads",
    "epochs=10": "Did you mean trainer.max_steps",
    "steps=10": "Did you mean trainer.max_steps or sampler.steps",
    "lr=1": "Did you mean optimizer.lr",
    "learning_rate=1e-4": "The rate itself is optimizer.lr",
    "name mine": "name mine: write name=mine",
    "name = mine": "name = mine: write name=mine",
    "name= mine": "name= mine: write name=mine",
    "name =mine": "name =mine: write name=mine",
    "seed=1 name mine": "name mine: write name=mine",
    "name=my run": "quote both: 'name=my run'",
    "data.root": "write data.root=VALUE",
    "mine": "write key=value, such as name=mine",
    "é=1": "'é' is no key",
    "data.image_size=[16,24]": "data.image_size=[16, 24] must be a whole number",
    "data.image_size=wide": "data.image_size is a whole number like 32, not a word",
    "data.batch_size=true": "data.batch_size is a whole number like 64, not true",
    "trainer.compile=yes": "trainer.compile is true or false",
    "optimizer.lr=nan": "optimizer.lr is a number like 0.001, not nan",
    "backbone.multipliers=[1,2": "backbone.multipliers is a list like [1,2,2], not a word",
    "data.batch_size=null": "data.batch_size=null must be a whole number",
    "seed=null": "seed=null must be a whole number",
    "backbone.dropout=null": "backbone.dropout=null must be a number",
    "backbone.multipliers=[1,x]": (
        "backbone.multipliers=[1, 'x'] must be a list, each item a whole number"
    ),
    "callbacks.early_stopping.patience=x": (
        "callbacks.early_stopping.patience=x must be a whole number or null"
    ),
    "trainer.devices=0,1": "choose among GPUs with CUDA_VISIBLE_DEVICES",
    "seed=1,2": "for a run with each value add -m",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_slip_is_answered_in_a_line(words):
    with pytest.raises(UsageError) as mistake:
        composed("train", *words.split())
    assert MISTAKES[words] in str(mistake.value)
    assert "\n" not in str(mistake.value)


REFUSED = {
    "callbacks.checkpoint=null": "callbacks.checkpoint.every_n_train_steps=null",
    "trainer.precision=16-mixed": "loss scale",
    "trainer.precision=fp16": "use bf16-mixed",
    "trainer.precision=half": "use bf16-mixed",
    "trainer.precision=bf16": "use bf16-mixed",
    "trainer.precision=fp32": "use 32-true",
    "trainer.precision=64-true": "drawn in 32 bits",
    "trainer.precision=8": "use 32-true or bf16-mixed",
    "trainer.accelerator=tpu": "must be one of auto, cpu, gpu, cuda, mps",
    "trainer.accelerator=null": "must be one of auto, cpu, gpu, cuda, mps",
    "trainer.devices=0": "must be a number, or auto",
    "trainer.devices=[0,1]": "CUDA_VISIBLE_DEVICES",
    "trainer.devices='0,1'": "CUDA_VISIBLE_DEVICES",
    "trainer.devices=true": "must be a number, or auto",
    "trainer.max_steps=1e400": "trainer.max_steps=inf must be a whole number",
    "data.shards=0": "data.shards=0 must be a whole number, 1 or more, or null",
}


@pytest.mark.parametrize("word", REFUSED)
def test_a_setting_that_cannot_be_used_is_refused_with_its_key(word):
    cfg = composed("train", word)

    def start():
        check_settings(cfg)
        local_world_size(cfg)

    with pytest.raises(ConfigError) as unfit:
        start()
    assert REFUSED[word] in str(unfit.value)
    assert word.split("=")[0] in str(unfit.value)


def test_no_value_of_any_key_is_a_traceback():
    rng = random.Random(0)
    keys = [
        key
        for key in flatten(composed("train", "backbone=dit", "ema=power"))
        if "_target_" not in key
    ]
    for key, text in zip(
        rng.sample(keys, 40), itertools.cycle(["null", "x", "-1", "[]", "{}", "1e400"])
    ):
        with suppress(UsageError, ConfigError):
            cfg = composed("train", "backbone=dit", "ema=power", f"{key}={text}")
            check_settings(cfg)


FLAGS = {
    "--name=mine": (2, "keys are written without dashes: name=mine"),
    "--data folder": (2, "keys are written without dashes: data=folder"),
    "--experiment cars": (2, "keys are written without dashes: experiment=cars"),
    "--epochs 10": (2, "Did you mean trainer.max_steps"),
    "-m experiment=cars seed=1,2 --cfg job": (2, "leave -m out"),
    "--cfg job data.batchsize=3": (2, "Did you mean data.batch_size"),
    "--cfg job name=été": (0, "name: été"),
}


@pytest.mark.parametrize("words", FLAGS)
def test_flags_are_answered_without_a_traceback(words):
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", *words.split()],
        capture_output=True,
        text=True,
        timeout=60,
    )
    code, text = FLAGS[words]
    assert (done.returncode, done.stderr.count("\n") <= 1) == (code, True)
    assert text in done.stdout + done.stderr
