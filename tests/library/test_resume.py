"""Where a run is entered: each way of saying it, and the text of each refusal."""

import dataclasses
import json

import pytest
import torch

from exact_resume.checkpoint.store import MANIFEST, STATE, NoValidCheckpointError, Store
from exact_resume.fingerprint import fingerprint
from exact_resume.resume import (
    LastStart,
    ResumeRefusedError,
    Rules,
    check_compatibility,
    describe_guarantee,
    resolve_checkpoint,
    resolve_repeated,
    trajectories,
)

CONFIG = {
    "seed": 0,
    "optimizer": {"lr": 1e-3},
    "trainer": {"deterministic": True},
    "name": "a",
    "data": {"shards": 1},
}
RULES = Rules(ignore=["name"], rounding=["data.shards"])
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def now():
    return fingerprint(CONFIG, "digest of the data")


@pytest.fixture
def store(tmp_path, now):
    store = Store(tmp_path / "runs" / "a" / "checkpoints")
    for step in (3, 6, 9):
        store.commit(step, {"global_step": step}, fingerprint=now.as_dict())
    return store


def flip(store, step):
    path = store.state(step)
    path.write_bytes(path.read_bytes()[:-1] + b"x")


def refusal(store, ckpt_path, scores=None):
    with pytest.raises(ResumeRefusedError) as error:
        resolve_checkpoint(store, ckpt_path, scores or {}, "min")
    return str(error.value)


@pytest.mark.parametrize("word", ["auto", "last"])
def test_auto_and_last_are_the_newest_that_verifies(word, store):
    flip(store, 9)
    entry = resolve_checkpoint(store, word, {}, "min")
    assert (entry.step, entry.state) == (6, store.state(6))
    assert entry.explicit == (word == "last")


def test_without_checkpoints_auto_and_null_start_afresh_and_last_is_refused(tmp_path):
    store = Store(tmp_path / "checkpoints")
    assert resolve_checkpoint(store, "auto", {}, "min") is None
    assert resolve_checkpoint(store, None, {}, "min") is None
    text = refusal(store, "last")
    assert f"ckpt_path=last, but {store.directory} has no checkpoint" in text
    assert "ckpt_path=auto" in text


def test_null_leaves_a_run_that_has_checkpoints_alone(store):
    text = refusal(store, None)
    assert f"{store.directory} has checkpoints up to step 9" in text
    assert "ckpt_path=auto" in text
    assert "directory of its own" in text


@pytest.mark.parametrize(
    ("scores", "mode", "step"),
    [
        ({3: 0.5, 6: 0.2, 9: 0.3}, "min", 6),
        ({3: 0.5, 6: 0.2, 9: 0.3}, "max", 3),
        ({3: NAN, 6: 0.2, 9: INF}, "min", 6),
        ({3: NAN, 6: 0.2, 9: INF}, "max", 6),
        ({1: 0.1, 3: 0.5}, "min", 3),  # step 1 has a score and no checkpoint
    ],
)
def test_best_is_the_best_finite_score_that_has_a_checkpoint(scores, mode, step, store):
    entry = resolve_checkpoint(store, "best", scores, mode)
    assert entry.step == step
    assert entry.explicit


def test_best_passes_over_what_does_not_verify(store):
    flip(store, 6)
    assert resolve_checkpoint(store, "best", {3: 0.5, 6: 0.2, 9: 0.3}, "min").step == 9


@pytest.mark.parametrize("scores", [{}, {3: NAN}, {4: 0.1}])
def test_best_without_a_score_is_refused(scores, store):
    text = refusal(store, "best", scores)
    assert f"no checkpoint in {store.directory} has a score" in text
    assert "ckpt_path=last" in text


def test_a_path_may_be_the_directory_or_its_state(store, tmp_path):
    path, link = store.path(6), tmp_path / "link"
    link.symlink_to(path)
    for word in (str(path), f"{path}/", str(path / STATE), f"{path}/../step-00000006/", str(link)):
        entry = resolve_checkpoint(store, word, {}, "min")
        assert (entry.step, entry.explicit) == (6, True)
        assert entry.state.samefile(store.state(6))


def test_a_checkpoint_may_have_been_copied_and_renamed(store, tmp_path):
    copy = tmp_path / "good"
    store.path(6).rename(copy)
    assert resolve_checkpoint(store, str(copy), {}, "min").step == 6
    wrong = store.path(7)
    copy.rename(wrong)  # but not to the name of another step
    assert "belongs to step 6" in refusal(store, str(wrong))


@pytest.mark.parametrize("word", ["nowhere", "runs/a/checkpoints/step-00000500", 500, "", "none"])
def test_a_path_that_is_not_there_is_refused(word, store):
    text = refusal(store, word)
    assert (
        "is not there. It may be auto, last, best, null, a checkpoint's directory (step-00000500)"
        in text
    )


def test_a_path_that_does_not_verify_is_refused_and_left_in_its_place(store):
    flip(store, 6)
    text = refusal(store, str(store.path(6)))
    assert f"{store.path(6)} does not verify: state.ckpt has" in text
    assert store.steps() == [3, 6, 9]


def test_only_what_the_manifest_vouches_for_is_loaded(store):
    assert "manifest.json is not in its manifest.json" in refusal(
        store, str(store.path(6) / MANIFEST)
    )
    other = store.path(6) / "other.ckpt"
    torch.save({"global_step": 6}, other)
    assert "other.ckpt is not in its manifest.json" in refusal(store, str(other))


def test_a_foreign_file_has_its_own_step_and_no_guarantee(store, now, tmp_path):
    path = tmp_path / "foreign.ckpt"
    torch.save({"global_step": 123, "state_dict": {}}, path)
    entry = resolve_checkpoint(store, str(path), {}, "min")
    assert (entry.step, dict(entry.manifest)) == (123, {})
    guarantee = check_compatibility(entry, now, RULES)
    assert guarantee.level == "refused"
    assert "its origin is unknown" in guarantee.reasons[0]
    torch.save({"state_dict": {}}, path)
    assert "cannot be loaded: 'global_step'" in refusal(store, str(path))


def test_none_verifies_is_never_a_fresh_start(store):
    for step in store.steps():
        flip(store, step)
    for word in ("auto", "last", "auto"):
        with pytest.raises(NoValidCheckpointError, match="new directory"):
            resolve_checkpoint(store, word, {}, "min")


def test_the_same_run_is_continued_bitwise(store, now):
    assert (
        check_compatibility(resolve_checkpoint(store, "auto", {}, "min"), now, RULES).level
        == "bitwise"
    )


def test_a_changed_trajectory_is_refused_with_the_difference_unless_named_on_purpose(store, now):
    other = fingerprint(CONFIG | {"optimizer": {"lr": 0.5}, "name": "b"}, "digest of the data")
    with pytest.raises(ResumeRefusedError) as error:
        check_compatibility(resolve_checkpoint(store, "auto", {}, "min"), other, RULES)
    text = str(error.value)
    assert "optimizer.lr: 0.001 -> 0.5" in text
    assert "name:" not in text
    assert str(store.path(9)) in text
    assert "ckpt_path=last" in text
    for word in ("last", str(store.path(9))):
        guarantee = check_compatibility(resolve_checkpoint(store, word, {}, "min"), other, RULES)
        assert (guarantee.level, guarantee.reasons) == ("refused", ["optimizer.lr: 0.001 -> 0.5"])


def test_a_new_trajectory_is_said_and_kept_and_its_next_resume_has_a_guarantee_again(store, now):
    point = resolve_checkpoint(store, "auto", {}, "min")
    assert trajectories(None, None) == []
    assert trajectories(point, check_compatibility(point, now, RULES)) == []
    for trainer, level in ({"deterministic": True}, "bitwise"), ({}, "same samples"):
        other = fingerprint(CONFIG | {"trainer": trainer}, "other data")
        point = resolve_checkpoint(store, "last", {}, "min")
        guarantee = check_compatibility(point, other, RULES, data_changes=["1 is new", "2 went"])
        assert f"the next resume of it is {level} again" in describe_guarantee(guarantee)
        *_, reason = guarantee.reasons
        assert reason == "the data changed: 1 is new;\n        2 went"
        (entry,) = entries = trajectories(point, guarantee)
        assert (entry["step"], entry["data"]) == (9, "digest of the data")
        assert entry["reasons"][-1] == "the data changed: 1 is new; 2 went"
    store.commit(12, {"global_step": 12}, fingerprint=other.as_dict(), trajectories=entries)
    point = resolve_checkpoint(store, "auto", {}, "min")
    guarantee = check_compatibility(point, other, RULES)
    assert guarantee.level == "same samples"
    assert trajectories(point, guarantee) == entries  # a resume keeps what was there


def test_a_long_difference_is_cut(store, now):
    other = dataclasses.replace(now, config=now.config | {f"key{i:02}": 0 for i in range(50)})
    with pytest.raises(ResumeRefusedError) as error:
        check_compatibility(resolve_checkpoint(store, "auto", {}, "min"), other, RULES)
    assert str(error.value).count(": nothing -> 0") == 20
    assert "... and 30 more" in str(error.value)


def test_a_manifest_survives_json(store, now):
    assert json.loads((store.path(9) / MANIFEST).read_bytes())["fingerprint"] == now.as_dict()


def enter(store, ckpt_path):
    """Enter the run as training does, which moves newer checkpoints away."""
    entry = resolve_checkpoint(store, ckpt_path, {3: 0.5, 6: 0.1}, "min")
    if entry:
        store.move_newer(entry.step, store.directory.parent / "abandoned")
    LastStart.at(ckpt_path, entry).write(store.directory.parent)


def repeated(store, ckpt_path, *, restart=False):
    return resolve_repeated(ckpt_path, store.directory.parent, store, restart=restart)


@pytest.mark.parametrize("word", ["PATH", "best"])
@pytest.mark.parametrize("restart", [False, True])
def test_an_entry_on_purpose_happens_once_however_often_the_command_is_repeated(
    word, restart, store
):
    word = str(store.path(6)) if word == "PATH" else word
    assert repeated(store, word, restart=restart) == word
    enter(store, word)
    store.commit(7, {"global_step": 7})
    for _ in range(3):
        assert repeated(store, word, restart=restart) == "last"
    assert resolve_checkpoint(store, "last", {}, "min").step == 7


def test_another_word_and_then_the_same_again_enters_anew(store):
    six, three = str(store.path(6)), str(store.path(3))
    enter(store, six)
    assert repeated(store, three) == three  # another path branches
    enter(store, "auto")
    assert repeated(store, six) == six


def test_a_path_is_the_same_however_it_is_written_and_not_when_another_checkpoint_lies_there(
    store, monkeypatch
):
    enter(store, str(store.path(6)))
    monkeypatch.chdir(store.directory)
    assert repeated(store, "./step-00000006") == "last"
    manifest = store.path(6) / MANIFEST
    sha256 = json.loads(manifest.read_text())["files"][STATE]["sha256"]
    manifest.write_text(manifest.read_text().replace(sha256, "0" * 64))
    assert repeated(store, "./step-00000006") == "./step-00000006"


def test_what_was_killed_before_it_had_a_checkpoint_of_its_own_enters_again(store, tmp_path):
    elsewhere = Store(tmp_path / "other")
    LastStart.at(
        str(store.path(9)), resolve_checkpoint(store, str(store.path(9)), {}, "min")
    ).write(tmp_path)
    assert resolve_repeated(str(store.path(9)), tmp_path, elsewhere, restart=True) == str(
        store.path(9)
    )


def test_null_is_continued_by_a_restart_only(store):
    LastStart.at(None, None).write(store.directory.parent)
    assert repeated(store, None, restart=True) == "auto"
    assert repeated(store, None) is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"x": 1}'])
def test_a_mark_that_cannot_be_read_counts_as_none(content, store):
    (store.directory.parent / ".entered").write_text(content)
    assert repeated(store, "best") == "best"
