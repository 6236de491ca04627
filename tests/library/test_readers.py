"""Whoever reads a run changes nothing in it, and uses no byte that was not verified."""

import json
import math
import multiprocessing
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch

from exact_resume.checkpoint.store import (
    MANIFEST,
    SCORE,
    STATE,
    CorruptCheckpointError,
    NoValidCheckpointError,
    Store,
    load_state,
    read_checkpoint,
)
from exact_resume.checkpoint.writer import StoreCheckpointIO
from exact_resume.resume import ResumeRefusedError, read_resume_point, resolve_checkpoint
from exact_resume.resume import monitored_scores as scores_of
from sturdy.training.build import load_module
from sturdy.training.init_from import find_source

FORK = multiprocessing.get_context("fork")
CONFIG = {"callbacks.checkpoint.monitor": "val/acc", "callbacks.checkpoint.mode": "max"}


@pytest.fixture
def run(tmp_path):
    """The directory of a run with the checkpoints 3, 6 and 9, of which 3 is the best and 6 the
    second best.
    """
    store = Store(tmp_path / "run" / "checkpoints")
    for step, score in ((3, 0.9), (6, 0.8), (9, math.nan)):
        store.commit(
            step,
            {"global_step": step, "w": torch.full((500,), float(step))},
            fingerprint={"config": CONFIG},
        )
        store.write_score(step, "val/acc", score)
    return tmp_path / "run"


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def everything(directory):
    """All there is, with its content and times."""
    paths = [directory, *sorted(directory.rglob("*"))]
    return {
        path: (path.is_file() and path.read_bytes(), path.lstat().st_mtime_ns) for path in paths
    }


def found(run, ckpt_path):
    """The step of the entry, after a look at whether the state is that step's, and nothing was
    changed.
    """
    before = everything(run)
    entry, state = read_resume_point(run, ckpt_path)
    assert everything(run) == before
    assert torch.equal(state["w"], torch.full((500,), float(entry.step)))
    assert entry.state == Store(run / "checkpoints").state(entry.step)
    return entry.step


WORDS = {"last": 9, "best": 3, 6: 6, "6": 6, "00000006": 6, "step-00000006": 6}


@pytest.mark.parametrize("word", WORDS)
def test_a_checkpoint_is_named_by_a_word_or_its_step(word, run):
    assert found(run, word) == WORDS[word]
    if word not in ("last", "best"):
        assert resolve_checkpoint(Store(run / "checkpoints"), word, {}, "min").step == 6, (
            "in training, too"
        )


def test_a_step_of_the_run_comes_before_a_file_of_that_name(run, monkeypatch):
    monkeypatch.chdir(run)
    torch.save({}, "6")
    assert found(run, 6) == 6
    assert found(run, str(run / "checkpoints" / "step-00000006")) == 6


@pytest.mark.parametrize(("word", "step"), [("last", 6), ("best", 6)])
def test_a_broken_one_is_passed_over_with_a_line_and_left_where_it_is(word, step, run, caplog):
    broken = {"last": 9, "best": 3}[word]
    flip(run / "checkpoints" / f"step-{broken:08d}" / STATE)
    assert found(run, word) == step
    assert f"step-{broken:08d} does not verify (state.ckpt has changed" in caplog.text
    resolve_checkpoint(Store(run / "checkpoints"), "last", {}, "min")
    assert (run / "checkpoints" / "quarantine").exists() == (word == "last"), (
        "control: the lock's holder heals"
    )


def test_none_is_whole_or_there(run):
    for word in (12, "nowhere", "step-00000012"):
        with pytest.raises(
            ResumeRefusedError, match=rf"ckpt_path={word} is not there.*has the steps 3, 6, 9"
        ):
            read_resume_point(run, word)
    with pytest.raises(ResumeRefusedError, match="ckpt_path=null names no checkpoint"):
        read_resume_point(run, None)
    flip(run / "checkpoints" / "step-00000006" / STATE)
    with pytest.raises(
        ResumeRefusedError, match=r"ckpt_path=6 does not verify: state\.ckpt has changed"
    ):
        read_resume_point(run, 6)
    for step in (3, 9):
        flip(run / "checkpoints" / f"step-{step:08d}" / STATE)
    with pytest.raises(NoValidCheckpointError, match=r"verifies$"):
        found(run, "last")
    with pytest.raises(ResumeRefusedError, match="has no checkpoint"):
        read_resume_point(run / "elsewhere", "last")


def read_without_permission(run, answer):
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    try:
        (run / "checkpoints" / "mine").mkdir()
    except PermissionError:
        answer.send([found(run, "last"), found(run, "best"), status(run)])
    else:
        answer.send("it may write here: this shows nothing")


def status(run):
    from exact_resume.__main__ import main

    return [main([word, str(run)]) for word in ("status", "verify")]


def test_who_may_not_write_can_read(run):
    flip(run / "checkpoints" / "step-00000009" / STATE)
    above = [
        folder for folder in run.parents if "pytest-of" in str(folder)
    ]  # pytest's own, for nobody else to read
    for directory in (*above, run, *run.rglob("*")):
        directory.chmod(directory.stat().st_mode | 0o444 | (0o111 if directory.is_dir() else 0))
    before = everything(run)
    os.chmod(run / "checkpoints", 0o555)
    ours, theirs = FORK.Pipe()
    child = FORK.Process(target=read_without_permission, args=(run, theirs))
    child.start()
    assert ours.poll(60)
    assert ours.recv() == [6, 3, [1, 1]]
    child.join()
    assert everything(run) == before


def save_and_delete(directory):
    store, step = Store(directory), 0
    while True:
        step += 1
        store.commit(step, {"global_step": step, "w": torch.full((500,), float(step))})
        store.prune(set())


def test_beside_a_run_that_deletes_all_but_the_newest(tmp_path):
    store = Store(tmp_path / "checkpoints")
    trainer = FORK.Process(target=save_and_delete, args=(store.directory,), daemon=True)
    trainer.start()
    try:
        while not store.steps():
            pass
        for _ in range(200):
            entry, state = read_resume_point(tmp_path, "last")
            assert state["global_step"] == entry.step
    finally:
        trainer.kill()
        trainer.join()
    assert not (store.directory / "quarantine").exists()


def test_one_that_is_deleted_before_it_is_read_is_no_broken_one(tmp_path, caplog):
    store, tried = Store(tmp_path / "checkpoints"), []
    store.commit(1, {"global_step": 1})

    def read(directory):
        if not tried:  # a live run saves, and deletes what was listed
            store.commit(2, {"global_step": 2})
            store.prune(set())
        tried.append(directory)
        return read_checkpoint(directory)

    manifest, state = store.first_valid(lambda: store.steps()[::-1], read)
    assert (manifest["step"], state["global_step"]) == (2, 2)
    assert tried == [store.path(1), store.path(2)]
    assert caplog.text == ""
    with pytest.raises(CorruptCheckpointError, match="No such file"):
        read_checkpoint(store.path(1))


@pytest.mark.parametrize(
    "load",
    [
        load_state,
        load_module,
        lambda path: find_source(str(path), Path(".")),
        StoreCheckpointIO(Store("."), dict).load_checkpoint,
    ],
    ids=["load_state", "rebuild", "init_from", "training"],
)
def test_nobody_loads_what_the_manifest_does_not_vouch_for(load, run):
    path = run / "checkpoints" / "step-00000006" / STATE
    path.write_bytes(
        path.read_bytes().replace(struct.pack("<f", 6.0) * 500, struct.pack("<f", 7.0) * 500)
    )
    assert torch.load(path, weights_only=True)["w"][0] == 7, "control: PyTorch would load it"
    with pytest.raises(
        ValueError, match=r"step-00000006/state\.ckpt does not verify: state\.ckpt has changed"
    ):
        load(path)


def test_a_file_that_lies_alone_is_loaded_and_said_to_be_unverified(run, tmp_path, caplog):
    alone = tmp_path / "alone.ckpt"
    shutil.copy(run / "checkpoints" / "step-00000006" / STATE, alone)
    entry, state = read_resume_point(run, str(alone))
    assert (entry.step, state["global_step"], dict(entry.manifest)) == (6, 6, {})
    load_state(alone)
    assert (
        caplog.text.count(f"{alone} has no {MANIFEST} beside it, so its bytes are not verified")
        == 1
    )


def test_a_score_goes_where_its_checkpoint_goes(run, tmp_path):
    store = Store(run / "checkpoints")
    copy = Store(tmp_path / "copy" / "checkpoints")
    shutil.copytree(store.directory, copy.directory)
    monitor, mode, scores = scores_of(tmp_path / "copy", copy)
    assert (monitor, mode, scores[3], scores[6], math.isnan(scores[9])) == (
        "val/acc",
        "max",
        0.9,
        0.8,
        True,
    )
    assert store.scores("val/loss") == {}
    assert all(store.verify(step) for step in store.steps())


def test_a_broken_score_is_none_and_the_record_is_asked(run):
    store = Store(run / "checkpoints")
    flip(store.path(3) / SCORE)
    shutil.copy(store.path(9) / SCORE, store.path(6) / SCORE)
    (store.path(9) / f".{SCORE}").write_text("half wri")  # a kill
    assert list(store.scores("val/acc")) == [9]
    (run / "metrics.csv").write_text(
        "step,val/acc\n3,0.1\n6,much\n9,0.3\n6,0.95"
    )  # the last line is cut short
    assert scores_of(run, store)[2].keys() == {3, 9}
    assert found(run, "best") == 3
    store.remove_stale_temp()
    assert sorted(os.listdir(store.path(9))) == [MANIFEST, SCORE, STATE]


def test_without_a_score_the_best_is_refused(run):
    for score in run.rglob(SCORE):
        score.unlink()
    with pytest.raises(
        ResumeRefusedError, match=r"no checkpoint in .* has a score yet. Use ckpt_path=last"
    ):
        read_resume_point(run, "best")


def test_an_older_checkpoint_without_the_file_is_scored_by_the_record(run, capsys):
    for score in run.rglob(SCORE):
        score.unlink()
    (run / "metrics.csv").write_text("step,val/acc\n3,0.1\n6,0.2\n9,nan\n")
    assert found(run, "best") == 6
    status(run)
    row = next(line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["6"])
    assert row.endswith("0.2  best")
    assert (
        json.loads((run / "checkpoints" / "step-00000006" / MANIFEST).read_bytes())["format"] == 2
    )
