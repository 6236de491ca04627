"""What makes two runs the same trajectory: key by key, with the lists that the project ships."""

import dataclasses
import json

import pytest
import torch
from omegaconf import OmegaConf

from runs import ROOT
from sturdy.resume.fingerprint import compare, fingerprint, flatten, source_hashes

LISTS = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "train.yaml").resume)
CONFIG = {
    "name": "a",
    "seed": 0,
    "clip": 1.0,
    "ckpt_path": "auto",
    "paths": {"runs": "runs", "cache": ".cache"},
    "optimizer": {"lr": 1e-3, "betas": [0.9, 0.99]},
    "data": {"root": "/here", "batch_size": 64, "shards": 1, "num_workers": 0, "source": {"n": 10}},
    "callbacks": {"checkpoint": {"keep_last": 3}, "samples": {"n": 48}},
    "logger": {},
    "trainer": {"deterministic": True, "max_steps": 100, "threads": 1, "precision": "32-true"},
    "learning_rate": {"warmup": 100},
}


def changed(config, key, value):
    copy = OmegaConf.create(config)
    OmegaConf.update(copy, key, value, force_add=True)
    return OmegaConf.to_container(copy)


def judge(then, now):
    stored = json.loads(json.dumps(then.as_dict()))  # as a manifest gives it back
    return compare(stored, now, **LISTS)


@pytest.fixture(scope="module")
def then():
    return fingerprint(CONFIG, "d" * 64)


def test_nothing_changed_is_bitwise(then):
    guarantee = judge(then, fingerprint(CONFIG, "d" * 64))
    assert (guarantee.level, guarantee.reasons) == ("bitwise", [])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "b"),
        ("ckpt_path", "last"),
        ("paths.runs", "/elsewhere"),
        ("data.root", "/there"),
        ("data.num_workers", 4),
        ("callbacks.checkpoint.keep_last", 1),
        ("callbacks.samples.n", 8),
        ("logger", {"wandb": {"project": "x"}}),
        ("trainer.max_steps", 200),
        ("resume.ignore", ["everything"]),
    ],
)
def test_what_cannot_change_a_weight_is_ignored(key, value, then):
    assert judge(then, fingerprint(changed(CONFIG, key, value), "d" * 64)).level == "bitwise"


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("data.shards", 2, "data.shards: 1 -> 2"),
        ("trainer.threads", 2, "trainer.threads: 1 -> 2"),
        ("trainer.precision", "bf16-mixed", "trainer.precision: '32-true' -> 'bf16-mixed'"),
        ("trainer.deterministic", False, "trainer.deterministic is off"),
    ],
)
def test_what_changes_rounding_keeps_the_samples(key, value, reason, then):
    guarantee = judge(then, fingerprint(changed(CONFIG, key, value), "d" * 64))
    assert guarantee.level == "same samples"
    assert reason in guarantee.reasons


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("seed", 1, "seed: 0 -> 1"),
        ("optimizer.lr", 0.5, "optimizer.lr: 0.001 -> 0.5"),
        ("optimizer.betas", [0.9], "optimizer.betas.1: 0.99 -> nothing"),
        ("optimizer.fused", None, "optimizer.fused: nothing -> None"),
        ("data.batch_size", 32, "data.batch_size: 64 -> 32"),
        ("data.source.n", 11, "data.source.n: 10 -> 11"),
        ("backbone", {"width": 8}, "backbone.width: nothing -> 8"),
        ("learning_rate.max_steps", 200, "learning_rate.max_steps: nothing -> 200"),
        ("names", 1, "names: nothing -> 1"),  # no key of the list, though it begins like one
    ],
)
def test_all_else_is_the_trajectory(key, value, reason, then):
    guarantee = judge(then, fingerprint(changed(CONFIG, key, value), "d" * 64))
    assert (guarantee.level, guarantee.reasons) == ("refused", [reason])


def test_other_data_or_source_is_another_trajectory(then):
    reasons = judge(then, fingerprint(CONFIG, "e" * 64)).reasons
    assert reasons == ["the data changed: digest dddddddddddd -> eeeeeeeeeeee"]
    source = dict(then.source)
    source["diffusion/objective.py"], source["new.py"] = "0", "0"
    guarantee = judge(then, dataclasses.replace(then, source=source))
    assert guarantee.level == "refused"
    assert guarantee.reasons == ["the source changed: diffusion/objective.py", "the source changed: new.py"]


def test_another_stack_keeps_the_samples(then):
    stack = then.stack | {"torch": "9.9", "device": "abacus"}
    guarantee = judge(then, dataclasses.replace(then, stack=stack))
    assert guarantee.level == "same samples"
    assert guarantee.reasons == [f"{k}: {then.stack[k]} -> {stack[k]}" for k in ("device", "torch")]


def test_threads_are_part_of_the_stack(then):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        now = fingerprint(CONFIG, "d" * 64)
    finally:
        torch.set_num_threads(before)
    assert judge(then, now).reasons == [f"threads: {before} -> {before + 1}"]


def test_every_source_file_of_ours_counts():
    root = ROOT / "src" / "sturdy"
    assert set(source_hashes()) == {str(p.relative_to(root)) for p in root.rglob("*.py")}


def test_flat_keys():
    nested = {"a": {"b": [1, {"c": None}], "d": {}}, "e": []}
    assert flatten(nested) == {"a.b.0": 1, "a.b.1.c": None, "a.d": {}, "e": []}
