"""The mirrors hold what ``metrics.csv`` holds, each row once, after a SIGKILL and a resume; read from their files."""

import csv
import json
import shutil
import struct
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from runs import kill_at, train
from sturdy.training.loggers.tensorboard import Tensorboard
from sturdy.training.loggers.wandb import Wandb, has_key

BOTH = "logger=[wandb,tensorboard]"


@pytest.fixture(scope="module")
def nobody():
    """The environment of a user without an account."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MODE", "API_KEY", "IDENTITY_TOKEN_FILE", "BASE_URL", "DIR", "RUN_ID", "RESUME"):
            patch.delenv(f"WANDB_{name}", raising=False)
        patch.setenv("NETRC", "/nowhere/netrc")
        yield patch


@pytest.fixture(scope="module")
def runs(nobody, tmp_path_factory):
    """``killed`` before its first checkpoint and after step 8 (``at the kill``), resumed, and started once more."""
    pytest.importorskip("tensorboard")
    tmp = tmp_path_factory.mktemp("loggers")
    kill_at(tmp, "killed", 2, BOTH)
    kill_at(tmp, "killed", 8, BOTH)
    shutil.copytree(tmp / "runs" / "killed", tmp / "runs" / "at the kill", symlinks=True)
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
    assert set(record.values()) == {1}
    assert wandb_metrics(runs / "killed") == record
    assert tensorboard_metrics(runs / "killed") == (record, {6, 12})
    assert {row["_step"] for row in segment(runs / "killed")[1] if "samples._type" in row} == {6, 12}


def test_a_kill_leaves_tensorboard_behind_by_two_steps_at_most(runs):
    """A step is written when the next one comes. Control: wandb's rows were in a buffer, and it shows."""
    record = metrics(runs / "at the kill")
    last = max(step for step, _, _ in record)
    missing = record - tensorboard_metrics(runs / "at the kill")[0]
    assert {step for step, _, _ in missing} <= {last - 1, last}
    assert record - wandb_metrics(runs / "at the kill")


def test_wandb_has_the_id_and_the_config(runs):
    run, _ = segment(runs / "killed")
    assert run.run_id == (runs / "killed" / "wandb" / "id-0").read_text() in segment_file(runs / "at the kill").name
    assert run.project == "sturdy"
    assert run.display_name == "killed"
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["trainer"]["max_steps"] == 12
    assert config["data"]["image_size"] == 16


def test_a_branch_is_another_wandb_run(tmp_path):
    """What was uploaded cannot be rewound, so the id changes when a branch is left, and only then."""
    mirror = Wandb(directory=tmp_path)
    first = mirror._run_id()
    assert Wandb(directory=tmp_path)._run_id() == first
    (tmp_path / "abandoned" / "001").mkdir(parents=True)
    assert mirror._run_id() != first


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
    assert not mirror.works
    assert not again.works  # the picture
    whole = Tensorboard(directory=tmp_path / "tensorboard")
    whole.refill(rows, {})
    whole.finalize("success")
    assert tensorboard_metrics(tmp_path)[0] == {(1, "train/loss", 0.5): 1, (2, "train/loss", 0.25): 1}


def metrics(run: Path) -> Counter[tuple[int, str, float]]:
    """Every value of ``metrics.csv``, as the float32 that TensorBoard keeps: how often it is there."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return Counter((int(row["step"]), k, np.float32(v)) for row in rows for k, v in row.items() if v and k != "step")


def wandb_metrics(run: Path) -> Counter[tuple[int, str, float]]:
    _, rows = segment(run)
    names = ("train/", "val/")
    return Counter((row["_step"], k, np.float32(v)) for row in rows for k, v in row.items() if k.startswith(names))


def tensorboard_metrics(run: Path) -> tuple[Counter[tuple[int, str, float]], set[int]]:
    """The scalars, and the steps with an image."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    names, pictures = events.Tags()["scalars"], events.Tags()["images"]
    values = Counter((event.step, name, np.float32(event.value)) for name in names for event in events.Scalars(name))
    return values, {event.step for name in pictures for event in events.Images(name)}


def segment_file(run: Path) -> Path:
    [file] = (run / "wandb").glob("offline-run-*/run-*.wandb")
    return file


def segment(run: Path):
    """The run record and the history rows of the one offline segment."""
    from wandb.proto.wandb_internal_pb2 import Record

    records = [Record.FromString(data) for data in frames(segment_file(run).read_bytes())]
    history = [r.history for r in records if r.WhichOneof("record_type") == "history"]
    rows = [{i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in h.item} for h in history]
    run_record = next((r.run for r in records if r.WhichOneof("record_type") == "run"), None)
    return run_record, rows


def frames(data: bytes, header: int = 7, block: int = 32768) -> Iterator[bytes]:
    """Records of a LevelDB log, which is what a ``.wandb`` file is: crc (4), length (2), kind (1), data, in blocks."""
    at, record = header, b""
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""
