"""How a script that reads a run finds it, its device and a folder of its own; by the text of each
refusal.
"""

import json
import multiprocessing
import os

import pytest
import torch
from omegaconf import OmegaConf

from sturdy.sampling.labels import select_labels
from sturdy.sampling.loaded_run import (
    check_integers,
    find_device,
    find_run,
    run_job,
)
from sturdy.sampling.output_folder import PROVENANCE, claim_folder
from sturdy.sampling.sample import as_typed

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("base", "sweep/lr=1", "sweep/lr=2", "other"):
        (tmp_path / "runs" / name / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / "runs" / "notes").mkdir()
    (tmp_path / "elsewhere" / "mine" / "checkpoints").mkdir(parents=True)
    return tmp_path / "runs"


def test_a_run_is_named_or_its_directory_is(runs, tmp_path):
    for word in ("base", "runs/base", "runs/base/", str(runs / "base")):
        assert find_run(runs, word).samefile(runs / "base")
    assert find_run(runs, "sweep/lr=1").samefile(runs / "sweep" / "lr=1")
    assert find_run(runs, "elsewhere/mine").samefile(tmp_path / "elsewhere" / "mine")


def test_a_run_that_is_not_there_is_answered_with_those_that_are(runs, tmp_path):
    for word in ("bse", "runs/bse", str(runs / "bse")):
        with pytest.raises(
            ValueError,
            match=r"is not there; paths.runs=.*/runs has base, other, sweep/lr=1, sweep/lr=2$",
        ):
            find_run(runs, word)
    with pytest.raises(ValueError, match="has other, base, sweep"):
        find_run(runs, "othr")
    with pytest.raises(
        ValueError, match=rf"paths.runs={tmp_path}/nowhere has no runs. Give paths.runs="
    ):
        find_run(tmp_path / "nowhere", "base")
    (tmp_path / "alone.ckpt").touch()
    assert find_run(runs, "new", str(tmp_path / "alone.ckpt")) == runs / "new", (
        "the file alone is enough"
    )


def test_a_device_is_one_that_is_there():
    there = (
        "cuda"
        if torch.cuda.is_available()
        else "mps"
        if torch.backends.mps.is_available()
        else "cpu"
    )
    assert find_device("auto") == there
    assert find_device("cpu") == "cpu"
    if torch.cuda.is_available():
        assert find_device("gpu") == "cuda"
        assert find_device("gpu:0") == "cuda:0"
    missing = ["cuda:99", "tpu", "", 3, None] + (
        [] if torch.cuda.is_available() else ["cuda", "gpu", "cuda:0"]
    )
    for word in missing:
        with pytest.raises(
            ValueError, match=rf"device={word} is not there; torch finds .*cpu. device=auto takes"
        ):
            find_device(word)


@pytest.mark.parametrize("value", [0, -3, 2.5, True, None, "many"])
def test_a_number_is_whole_and_large_enough(value):
    with pytest.raises(ValueError, match=f"sample.n={value} must be a whole number of at least 1"):
        check_integers(OmegaConf.create({"n": value}), {"n": 1, "first": 0}, "sample.")
    check_integers({"n": 1, "seed": -1, "out": None}, {"n": 1, "seed": None})


def test_threads_and_errors_of_the_disk_are_answered_in_a_line(capsys):
    def missing(cfg):
        os.listdir("/nowhere/at/all")

    for threads, text in (
        (0, "threads=0 must be a whole number of at least 1"),
        (1, "/nowhere/at/all"),
    ):
        assert run_job(missing, OmegaConf.create({"threads": threads, "device": "cpu"})) == 2
        assert text in capsys.readouterr().err
    torch.use_deterministic_algorithms(False)


def folder(tmp_path, how, given=None):
    return claim_folder("sample.out", given, tmp_path / "pictures", how, ["*.png"])


def test_a_command_comes_back_to_its_folder_and_another_gets_another(tmp_path):
    first = folder(tmp_path, {"seed": 0, "sampler": {"steps": 2}})
    assert first == tmp_path / "pictures"
    assert json.loads((first / PROVENANCE).read_text()) == {"seed": 0, "sampler": {"steps": 2}}
    assert folder(tmp_path, {"seed": 1, "sampler": {"steps": 2}}).name == "pictures-2"
    assert folder(tmp_path, {"seed": 0, "sampler": {"steps": 2}}) == first
    with pytest.raises(
        ValueError, match=r"sample.out=.*/pictures holds .* \(sampler.steps: 2 -> 3\): give another"
    ):
        folder(tmp_path, {"seed": 0, "sampler": {"steps": 3}}, first)


def test_images_of_which_nothing_is_known_are_not_overwritten(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "000000.png").touch()
    assert folder(tmp_path, {"seed": 0}).name == "pictures-2"
    with pytest.raises(ValueError, match=rf"there is no {PROVENANCE} beside it"):
        folder(tmp_path, {"seed": 0}, tmp_path / "pictures")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").touch()
    assert folder(tmp_path, {"seed": 0}, tmp_path / "notes") == tmp_path / "notes", (
        "control: nothing to overwrite"
    )


def test_a_folder_that_cannot_be_made_is_answered_with_the_key(tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below", "/proc/x"):
        with pytest.raises(
            ValueError, match=rf"sample.out={out} cannot be written in: .*. Give another folder"
        ):
            folder(tmp_path, {"seed": 0}, out)


def claim(tmp_path, seed, barrier, answer):
    barrier.wait()
    answer.put((seed, folder(tmp_path, {"seed": seed}).name))


def test_commands_at_the_same_time_get_a_folder_each(tmp_path):
    barrier, answer = FORK.Barrier(6), FORK.Queue()
    others = [
        FORK.Process(target=claim, args=(tmp_path, i // 2, barrier, answer)) for i in range(6)
    ]
    for other in others:
        other.start()
    found = {answer.get(timeout=60) for _ in others}
    for other in others:
        other.join()
    assert {seed for seed, _ in found} == {0, 1, 2}
    assert sorted(name for _, name in found) == ["pictures", "pictures-2", "pictures-3"]
    assert all(
        json.loads((tmp_path / name / PROVENANCE).read_text()) == {"seed": seed}
        for seed, name in found
    )


def test_a_word_that_names_a_class_is_that_class():
    names = ["3", "5", "8"]
    for word, index in {"3": 0, 5: 1, "8": 2}.items():
        assert select_labels(word, names, [], 2).tolist() == [index, index]
    for word in (1, "1", 4, -1):
        with pytest.raises(
            ValueError, match=f"sample.label={word} is no class of this run; there are: 3, 5, 8$"
        ):
            select_labels(word, names, [], 2)
    assert select_labels(1, ["cat", "dog"], [], 1).tolist() == [1], (
        "where no name is a number, a number is a place"
    )
    assert select_labels("prior", ["cat", "prior"], [0.5, 0.5], 2).tolist() == [1, 1]
    assert select_labels(None, ["cat", "dog"], [], 3).tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("word", "value"), [("1e3", 1000.0), ("true", True), ("null", None), ("007", 7)]
)
def test_what_hydra_takes_for_no_word_is_one(word, value):
    assert as_typed(["run=a", f"sample.label={word}"], "sample.label", value) == word
    assert select_labels(
        as_typed([f"sample.label={word}"], "sample.label", value), ["other", word], [], 1
    ).tolist() == [1]
    assert as_typed(["run=a"], "sample.label", None) is None
    assert as_typed(["sample.label='true'"], "sample.label", "true") == "true"
