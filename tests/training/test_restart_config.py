"""What a run began with: when a restart goes on with it, and how the config is given back."""

import json

import pytest
from omegaconf import OmegaConf

from exact_resume.resume import is_restart
from sturdy.training.restart_config import PreviousStart, find_previous_start, restore_config

IGNORE = ["trainer.max_steps", "ckpt_path", "paths"]
CONFIG = {
    "optimizer": {"lr": 1e-3, "betas": [0.9, 0.99]},
    "backbone": {"width": 8, "num_classes": 3},
    "num_classes": 3,
    "classes": ["a", "b", "c"],
    "num_conditions": 0,
    "prior": [],
    "paths": {"runs": "x"},
}


def attempt(run, number, overrides, config=CONFIG, **more):
    directory = run / "attempts" / f"{number:03}"
    directory.mkdir(parents=True)
    (directory / "environment.json").write_text(
        json.dumps({"overrides": overrides, "data": "d", **more})
    )
    OmegaConf.save(OmegaConf.create(config), directory / "config.yaml")
    return directory


@pytest.mark.parametrize(
    ("variables", "key", "answer"),
    [
        ({}, None, False),
        ({"TORCHELASTIC_RESTART_COUNT": "0"}, None, False),
        ({"TORCHELASTIC_RESTART_COUNT": "2"}, None, True),
        ({"SLURM_RESTART_COUNT": "1"}, None, True),
        ({"SLURM_RESTART_COUNT": ""}, None, False),
        ({"SLURM_RESTART_COUNT": "1"}, False, False),
        ({}, True, True),
    ],
)
def test_who_made_a_start(variables, key, answer, monkeypatch):
    for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert is_restart(key) is answer


def test_the_newest_start_by_the_same_command_is_what_it_began_with(tmp_path):
    attempt(tmp_path, 1, ["optimizer.lr=1"], CONFIG | {"paths": {"runs": "old"}})
    attempt(tmp_path, 2, ["optimizer.lr=1", "trainer.max_steps=9"])
    half = attempt(tmp_path, 3, [])
    (half / "config.yaml").unlink()  # a kill
    found = find_previous_start(
        tmp_path, ["optimizer.lr=1", "ckpt_path=last", "as_begun=true"], ignore=IGNORE
    )
    assert found == PreviousStart(CONFIG, "d")


def test_after_another_command_there_is_nothing_to_go_on_with(tmp_path):
    assert find_previous_start(tmp_path, [], ignore=IGNORE) is None
    attempt(tmp_path, 1, ["optimizer.lr=1"])
    attempt(tmp_path, 2, ["optimizer.lr=2"])
    assert find_previous_start(tmp_path, ["optimizer.lr=1"], ignore=IGNORE) is None


def test_what_was_edited_is_given_back_and_said(tmp_path):
    edited = OmegaConf.create(
        {
            "optimizer": {"lr": 5.0, "betas": [0.9, 0.99, 0.5], "new": 1},
            "backbone": {"num_classes": "${num_classes}"},
            "num_classes": 0,
            "classes": [],
            "num_conditions": 0,
            "prior": [],
            "paths": {"runs": "moved"},
            "added": {"deep": True},
        }
    )
    OmegaConf.set_struct(edited, True)
    told = restore_config(edited, PreviousStart(CONFIG, "d"), keep=IGNORE)
    expected = CONFIG | {"paths": {"runs": "moved"}, "added": {}}
    assert OmegaConf.to_container(edited, resolve=True) == expected
    assert told == [
        "added.deep is left out, as it began with, and not True",
        "backbone.width is 8, as it began with, and not left out",
        "optimizer.betas.2 is left out, as it began with, and not 0.5",
        "optimizer.lr is 0.001, as it began with, and not 5.0",
        "optimizer.new is left out, as it began with, and not 1",
    ]


def test_where_nothing_was_edited_nothing_changes():
    config = OmegaConf.create(
        CONFIG | {"backbone": {"width": 8, "num_classes": "${num_classes}"}, "num_classes": 0}
    )
    assert restore_config(config, PreviousStart(CONFIG, "d"), keep=IGNORE) == []
    assert OmegaConf.to_container(config)["backbone"]["num_classes"] == "${num_classes}"
