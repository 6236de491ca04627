"""What makes two runs the same trajectory: key by key, with the lists that the project ships."""

import dataclasses
import json

import pytest
import torch
from omegaconf import OmegaConf

from exact_resume.fingerprint import file_hashes, fingerprint, flatten
from exact_resume.resume import Rules, compare_fingerprints
from runs import ROOT

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
    return compare_fingerprints(stored, now, Rules(**LISTS))


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


def test_other_data_is_another_trajectory_and_what_changed_is_said(then):
    now = fingerprint(CONFIG, "e" * 64)
    assert judge(then, now).reasons == ["the data changed: digest dddddddddddd -> eeeeeeeeeeee"]
    told = compare_fingerprints(
        then.as_dict(),
        now,
        Rules(**LISTS),
        data_changes=["13 images are new (a.jpg)", "1 is gone (b.jpg)"],
    )
    (reason,) = told.reasons
    assert reason.split(";\n        ") == [
        "the data changed: 13 images are new (a.jpg)",
        "1 is gone (b.jpg)",
    ]


def test_other_code_is_another_trajectory_said_in_one_line_after_the_config(then):
    old = dataclasses.replace(then, code={"a.net": "1", "a.same": "2"})
    now = dataclasses.replace(
        fingerprint(CONFIG | {"seed": 1}, "e" * 64), code={"a.net": "9", "a.same": "2", "b": "3"}
    )
    guarantee = judge(old, now)
    assert guarantee.level == "refused"
    assert guarantee.reasons == [
        "seed: 0 -> 1",
        "the data changed: digest dddddddddddd -> eeeeeeeeeeee",
        "the code changed, 2 of 3 modules: a.net, b",
    ]


def test_many_modules_are_counted_and_the_first_named(then):
    now = dataclasses.replace(then, code={f"m{i:02}": "1" for i in range(50)})
    (reason,) = judge(then, now).reasons
    assert reason == "the code changed, 50 of 50 modules: m00, m01, m02, m03, m04, m05, and 44 more"


def test_a_run_of_an_older_version_is_continued_with_the_same_samples(then):
    stored = then.as_dict() | {"source": {"backbone/dit.py": "0"}}
    for later in ("code", "files"):
        del stored[later]
    guarantee = compare_fingerprints(stored, then, Rules(**LISTS))
    assert guarantee.level == "same samples"
    assert "an older version of this project wrote the checkpoint" in guarantee.reasons[0]


def test_a_key_that_came_later_has_the_value_that_older_runs_had(then):
    lists = LISTS | {"added": {"data.split": "count"}}
    for value, level in (("count", "bitwise"), ("content", "refused")):
        now = fingerprint(changed(CONFIG, "data.split", value), "d" * 64)
        assert compare_fingerprints(then.as_dict(), now, Rules(**lists)).level == level
    now = fingerprint(changed(CONFIG, "data.split", "content"), "d" * 64)
    assert compare_fingerprints(then.as_dict(), now, Rules(**lists)).reasons == [
        "data.split: 'count' -> 'content'"
    ]


def test_files_count_by_content_and_never_by_path(tmp_path):
    def at(folder, content):
        file = tmp_path / folder / "weights.pt"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
        config = CONFIG | {"backbone": {"weights": str(file)}}
        return fingerprint(config, "d" * 64, files=file_hashes(flatten(config), leave_out=["data"]))

    then = at("a", b"one")
    assert judge(then, at("b", b"one")).level == "bitwise"  # moved
    guarantee = judge(then, at("a", b"two"))
    assert guarantee.level == "refused"
    assert "backbone.weights: the content of" in guarantee.reasons[0]


def test_the_files_of_a_folder_count_and_those_of_left_out_keys_do_not(tmp_path):
    (tmp_path / "model" / "part").mkdir(parents=True)
    (tmp_path / "model" / "part" / "w.bin").write_bytes(b"1")
    config = {
        "model": str(tmp_path / "model"),
        "data.root": str(tmp_path),
        "word": "adamw",
        "none": "",
        "nul": "a\0b",
    }
    before = file_hashes(config, leave_out=["data"])
    assert set(before) == {"model"}
    (tmp_path / "model" / "part" / "w.bin").write_bytes(b"2")
    assert file_hashes(config, leave_out=["data"]) != before


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


def test_flat_keys():
    nested = {"a": {"b": [1, {"c": None}], "d": {}}, "e": []}
    assert flatten(nested) == {"a.b.0": 1, "a.b.1.c": None, "a.d": {}, "e": []}
