"""Mistakes are answered with what to type, and every option composes; by the text."""

import subprocess
import sys

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from runs import ROOT
from sturdy.cli.overrides import check_composed, compose_checked

MISTAKES = {
    "data.batchsize=8": "there is no key 'data.batchsize'. Did you mean data.batch_size",
    "experiment=carz": "there is no such experiment. Did you mean cars?",
    "sampler=heum": "there is no such sampler. Did you mean heun?",
    "sampelr=heun": "Did you mean sampler",
    "+backbone.widht=3": "takes no 'widht'. Did you mean width?",
    "+trainer.foo=1": "lightning.Trainer takes no 'foo'",
    "data=folder": "data.root must be given: data.root=...",
    "data.batch_size=many": "data.batch_size is a whole number like 64, not a word",
    "trainer.max_epochs=3": (
        "trainer.max_epochs is refused: training counts steps: use trainer.max_steps"
    ),
    "+trainer.accumulate_grad_batches=2": "refused: use data.shards",
    "trainer.fast_dev_run=true": "refused: use debug=default",
    "trainer.limit_train_batches=2": "refused: use trainer.max_steps",
    "hydra.run.dir=there": "refused: the run's directory is paths.runs/name",
    "--config-dir=there": "--config-dir is refused: configs are in",
}


@pytest.mark.parametrize("word", MISTAKES)
def test_mistakes_are_answered(word):
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", word], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert MISTAKES[word] in done.stderr
    assert "Traceback" not in done.stderr


def test_a_config_may_ask_what_was_chosen():
    words = [
        "experiment=cars",
        "name=${hydra:runtime.choices.experiment}-${hydra:runtime.choices.backbone}",
    ]
    assert compose_checked(ROOT / "conf" / "train.yaml", words).name == "cars-aligned_dit"


def test_mistakes_and_help_import_neither_torch_nor_lightning():
    for words in ("data.batchsize=8", "--help", "+trainer.foo=1", "seed=0,1 -m data.batchsize=8"):
        command = [sys.executable, "-X", "importtime", str(ROOT / "train.py"), *words.split()]
        lines = subprocess.run(
            command, capture_output=True, text=True, timeout=60
        ).stderr.splitlines()
        imported = {
            line.rsplit("|", 1)[-1].strip() for line in lines if line.startswith("import time:")
        }
        assert "hydra" in imported
        assert not imported & {"torch", "lightning", "sturdy.training.session"}


GROUPS = ("data", "debug", "experiment", "logger", "trainer")


OPTIONS = [
    f"{group}={path.stem}"
    for group in GROUPS
    for path in sorted((ROOT / "conf" / group).glob("*.yaml"))
]


@pytest.mark.parametrize("choice", OPTIONS)
def test_every_option_composes_to_what_its_classes_take(choice):
    needed = {"data=folder": ["data.root=."]}
    needed["experiment=finetune"] = ["data.root=.", "base.path=."]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        check_composed(compose("train", [choice, *needed.get(choice, [])]))


def test_an_experiment_goes_with_ones_own_images():
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", ["experiment=cars", "data=folder", "data.root=."])
    check_composed(cfg)
    assert cfg.backbone.width == 128


@pytest.mark.parametrize("choice", [o for o in OPTIONS if o.startswith(("objective=", "sampler="))])
def test_an_experiment_goes_with_other_choices(choice):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", ["experiment=cars", choice])
    instantiate(cfg.objective)
    instantiate(cfg.sampler)


@pytest.mark.parametrize("group", ["alignment", "ema"])
def test_an_experiment_goes_with_every_option(group):
    for path in (ROOT / "conf" / group).glob("*.yaml"):
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            check_composed(compose("train", ["experiment=cars", f"{group}={path.stem}"]))
