"""A checkpoint of an older format is read under today's names."""

import pytest
import torch

from exact_resume.checkpoint import schema
from exact_resume.checkpoint.renames import RENAMED, Renamed, rename_state
from exact_resume.checkpoint.store import load_state
from tiny_module import fit, make, save

OLD = Renamed(
    weights={"backbone.inlet": "backbone.into"},
    targets={"sturdy.networks": "sturdy.backbone"},
    keys={"average.decay": "ema.decay", "gone": "there"},
)


@pytest.fixture
def second_format(monkeypatch):
    """Today's format is the second, and some names are others than in the first."""
    monkeypatch.setitem(RENAMED, schema.FORMAT, OLD)
    monkeypatch.setattr(schema, "FORMAT", schema.FORMAT + 1)


def aged(path, tmp_path):
    """The checkpoint as a version of the first format would have written it."""
    state = load_state(path)
    old = {k.replace("backbone.into", "backbone.inlet"): v for k, v in state["state_dict"].items()}
    optimizer = state["optimizer_states"][0]
    moments = {
        k.replace("backbone.into", "backbone.inlet"): v for k, v in optimizer["state"].items()
    }
    groups = [
        group
        | {"params": [name.replace("backbone.into", "backbone.inlet") for name in group["params"]]}
        for group in optimizer["param_groups"]
    ]
    aged = state | {
        "state_dict": old,
        "optimizer_states": [{"state": moments, "param_groups": groups}],
    }
    del aged["format"]
    directory = tmp_path / "step-00000002"
    directory.mkdir(parents=True)
    torch.save(aged, directory / "state.ckpt")
    return directory / "state.ckpt"


def test_a_run_goes_on_from_names_that_are_no_longer_used(tmp_path, monkeypatch):
    whole, again = make(), make()
    fit(whole, tmp_path / "whole", steps=4)
    old = aged(save(fit(make(), tmp_path / "half", steps=2)[0]), tmp_path / "old")
    with pytest.raises(ValueError, match=r"is of another network .*inlet"):  # a control
        fit(make(), tmp_path / "control", steps=4, entry=old)
    monkeypatch.setitem(RENAMED, schema.FORMAT, OLD)
    monkeypatch.setattr(schema, "FORMAT", schema.FORMAT + 1)
    fit(again, tmp_path / "again", steps=4, entry=old)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in whole.state_dict().items())


@pytest.mark.usefixtures("second_format")
def test_what_the_config_names_is_renamed_too():
    config = {
        "backbone": {
            "_target_": "sturdy.networks.dit.DiT",
            "parts": [{"_target_": "sturdy.networks_of_mine.A"}],
        },
        "average": {"decay": 0.9, "kind": "plain"},
        "ema": {},
        "gone": 1,
    }
    state = {
        "config": config,
        "state_dict": {"ema.model.backbone.inlet.bias": 1, "ema.model.backbone.inlets": 2},
    }
    found = rename_state(state | {"format": schema.FORMAT - 1})
    assert found["config"] == {
        "backbone": {
            "_target_": "sturdy.backbone.dit.DiT",
            "parts": [{"_target_": "sturdy.networks_of_mine.A"}],
        },
        "average": {"kind": "plain"},
        "ema": {"decay": 0.9},
        "there": 1,
    }
    assert found["state_dict"] == {
        "ema.model.backbone.into.bias": 1,
        "ema.model.backbone.inlets": 2,
    }
    assert found["format"] == schema.FORMAT
    assert rename_state(found) is found
    assert config["gone"] == 1, "the caller's is left alone"


def test_today_nothing_is_renamed():
    state = {"state_dict": {"a": torch.ones(1)}, "format": schema.FORMAT}
    assert rename_state(state) is state
