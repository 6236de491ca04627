"""Loggers hold each row of ``metrics.csv`` once, after a SIGKILL and a resume.

All is read from the loggers' files.
"""

import json
import shutil
import sys

import numpy as np
import pytest

from mirrors import (
    metrics,
    segment,
    segment_file,
    summaries,
    tensorboard_metrics,
    wandb_metrics,
)
from runs import kill_at, train
from sturdy.evaluation.record import write_row
from sturdy.training.loggers.tensorboard import Tensorboard
from sturdy.training.loggers.wandb import Wandb, has_key

BOTH = "logger=[wandb,tensorboard]"


@pytest.fixture(scope="module")
def runs(nobody, tmp_path_factory):
    """``killed`` before its first checkpoint and after step 8 (``at the kill``), resumed, and
    started once more.
    """
    pytest.importorskip("tensorboard")
    tmp = tmp_path_factory.mktemp("loggers")
    kill_at(tmp, "killed", 2, BOTH)
    kill_at(tmp, "killed", 8, BOTH)
    shutil.copytree(tmp / "runs" / "killed", tmp / "runs" / "at the kill", symlinks=True)
    write_row(tmp / "runs" / "killed", 3, {"evaluation/kid": 0.25})
    write_row(
        tmp / "runs" / "killed", 12, {"evaluation/kid": 0.125}
    )  # of the future, for a start at an earlier step
    resumed = train(tmp, "killed", BOTH)
    assert "resumed from step" in resumed.stdout
    assert resumed.stdout.count("wandb:") == 1  # ours; wandb itself is silent
    assert resumed.stderr == ""
    assert "finished at step 12" in train(tmp, "killed", BOTH).stdout
    return tmp / "runs"


def test_a_killed_and_resumed_run_has_every_row_once(runs):
    record = metrics(runs / "killed")
    assert {step for step, key, _ in record if key == "train/loss"} == set(range(1, 13))
    assert {step for step, key, _ in record if key == "val/loss"} == {4, 8, 12}
    record[3, "evaluation/kid", np.float32(0.25)] = (
        1  # what a report said of a step is filled up beside its row
    )
    assert set(record.values()) == {1}
    assert wandb_metrics(runs / "killed") == record
    assert tensorboard_metrics(runs / "killed") == (record, {6, 12})
    assert {row["_step"] for row in segment(runs / "killed")[1] if "samples._type" in row} == {
        6,
        12,
    }


def test_a_kill_leaves_tensorboard_behind_by_two_steps_at_most(runs):
    """A step is written when the next one comes. Control: wandb's rows were in a buffer, and it
    shows.
    """
    record = metrics(runs / "at the kill")
    last = max(step for step, _, _ in record)
    missing = record - tensorboard_metrics(runs / "at the kill")[0]
    assert {step for step, _, _ in missing} <= {last - 1, last}
    assert record - wandb_metrics(runs / "at the kill")


def test_wandb_has_the_id_and_the_config(runs):
    run, _ = segment(runs / "killed")
    assert (
        run.run_id
        == (runs / "killed" / "wandb" / "id-0").read_text()
        in segment_file(runs / "at the kill").name
    )
    assert run.project == "sturdy"
    assert run.display_name == "killed"
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["trainer"]["max_steps"] == 12
    assert config["data"]["image_size"] == 16


def test_a_branch_is_another_wandb_run(tmp_path):
    """What was uploaded cannot be rewound, so the id changes when a branch is left, and only
    then.
    """
    mirror = Wandb(directory=tmp_path)
    first = mirror._run_id()
    assert Wandb(directory=tmp_path)._run_id() == first
    (tmp_path / "abandoned" / "001").mkdir(parents=True)
    assert mirror._run_id() != first


def test_a_copied_run_is_another_wandb_run_and_a_moved_one_the_same(tmp_path, caplog):
    original, copy, moved = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    original.mkdir()
    first = Wandb(directory=original)._run_id()
    segment = original / "wandb" / f"offline-run-1-{first}"
    segment.mkdir()
    shutil.copytree(original, copy)
    caplog.set_level("INFO", "sturdy")
    other = Wandb(directory=copy)._run_id()
    assert other != first
    assert f"{copy} is a copy of {original}, so it gets an id of its own" in caplog.text
    assert [*copy.glob(f"wandb/offline-run-*-{other}*")] == [], "what it would replace"
    assert Wandb(directory=copy)._run_id() == other
    assert Wandb(directory=original)._run_id() == first
    original.rename(moved)
    assert Wandb(directory=moved)._run_id() == first
    (tmp_path / "link").symlink_to(moved)
    assert Wandb(directory=tmp_path / "link")._run_id() == first
    original.mkdir()  # a new run in the old place
    assert Wandb(directory=original)._run_id() not in (first, other)
    assert Wandb(directory=moved)._run_id() == first


def test_a_key_is_found_in_the_environment_and_in_netrc(nobody, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        assert not has_key()
        patch.setenv("NETRC", str(tmp_path / "netrc"))
        (tmp_path / "netrc").write_text("machine example.com login user password secret\n")
        assert not has_key()
        patch.setenv("WANDB_BASE_URL", "https://example.com")
        assert has_key()
        patch.delenv("WANDB_BASE_URL")
        (tmp_path / "netrc").write_text("default login user password secret\n")
        assert not has_key()
        (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
        assert has_key()
        patch.setenv("NETRC", "/nowhere/netrc")
        patch.setenv("WANDB_API_KEY", "secret")
        assert has_key()


def test_reports_about_steps_that_a_server_has_go_into_its_summary(nobody, tmp_path):
    """The history of wandb cannot be changed once it has gone on."""
    logger = Wandb(directory=tmp_path)
    logger.start()
    logger.first_step = 5
    for step in (3, 4, 6):
        logger.write(step, {"train/loss": 1.0, "evaluation/kid": step / 8}, {})
    logger.close(True)
    assert [row["_step"] for row in segment(tmp_path)[1]] == [6]
    assert summaries(tmp_path)[:2] == [{"evaluation/kid": 0.375}, {"evaluation/kid": 0.5}]


def test_tensorboard_missing_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.record_writer", None)
    with pytest.raises(ImportError, match=r"pip install 'sturdy-diffusion\[tensorboard\]'"):
        Tensorboard(directory=tmp_path)


def test_a_mirror_that_fails_does_not_stop_the_run(tmp_path):
    pytest.importorskip("tensorboard")
    rows = [{"step": "1", "train/loss": "0.5"}, {"step": "2", "train/loss": "0.25"}]
    mirror = Tensorboard(directory=tmp_path / "tensorboard")
    mirror.refill(rows[:1], {})
    mirror.writer.close()  # as a full disk or a dead service would
    mirror.log_metrics({"train/loss": 0.25}, 2)
    mirror.finalize("success")
    again = Tensorboard(directory=tmp_path / "tensorboard")
    again.refill(rows, {2: tmp_path / "nowhere.png"})
    again.finalize("success")
    assert not mirror.healthy
    assert not again.healthy  # the picture
    whole = Tensorboard(directory=tmp_path / "tensorboard")
    whole.refill(rows, {})
    whole.finalize("success")
    assert tensorboard_metrics(tmp_path)[0] == {
        (1, "train/loss", 0.5): 1,
        (2, "train/loss", 0.25): 1,
    }
