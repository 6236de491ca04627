"""Figures of a report, on a run's record and two real mirrors of it; and what must not cost the
report.
"""

import json
import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from exact_resume.checkpoint.store import Store
from exact_resume.metrics import MetricsCSV
from exact_resume.replay import recorded_rows
from exact_resume.resume import ResumePoint
from exact_resume.run import AlreadyRunningError, Run
from mirrors import frames, metrics, segment, segment_file, tensorboard_metrics, wandb_metrics
from sturdy.evaluation.record import figures, mirrors_of, record
from sturdy.training.loggers.evaluations import keep
from sturdy.training.loggers.tensorboard import Tensorboard
from sturdy.training.loggers.wandb import Wandb

FORK = multiprocessing.get_context("fork")
LOGGERS = "sturdy.training.loggers."
NUMBERS = {
    "n": 24,
    "quality": {
        "n": 12,
        "held_out_samples": {"kid": 0.125, "fd": 3.5, "recall": 0.5},
        "held_out_floor": {"kid": 9.0},
    },
    "memorisation_pixels": {"copies": 0.25},
    "memorisation_features": {"copies": float("nan")},
    "class_accuracy": {"all": 0.75, "bus": 0.5},
    "frequencies": [{"samples": 0.5, "truth": 0.25}, {"samples": 0.125, "truth": 0.5}],
}
FIGURES = {
    "n": 24,
    "kid": 0.125,
    "fd": 3.5,
    "recall": 0.5,
    "copies_pixels": 0.25,
    "class_accuracy": 0.75,
}
FIGURES = {
    f"evaluation/{name}": value for name, value in {**FIGURES, "worst_difference": 37.5}.items()
}


def run_of(tmp: Path, loggers=("tensorboard",), max_steps=4):
    """A run of four steps: its directory, its config, and an entry to it."""
    run = tmp / "runs" / "mine"
    run.mkdir(parents=True)
    for step in range(1, 5):
        MetricsCSV(run / "metrics.csv").log_metrics({"train/loss": 1 / step}, step)
    nodes = {
        "tensorboard": {
            "_target_": f"{LOGGERS}tensorboard.Tensorboard",
            "directory": f"{run}/tensorboard",
        },
        "wandb": {"_target_": f"{LOGGERS}wandb.Wandb", "directory": str(run), "run_name": "mine"},
    }
    config = {
        "paths": {"runs": str(run.parent)},
        "name": "mine",
        "trainer": {"max_steps": max_steps},
    }
    return run, config | {"logger": {name: nodes[name] for name in loggers}}


def entry(run: Path, step: int) -> ResumePoint:
    return ResumePoint(
        run / "checkpoints" / f"step-{step:08d}" / "state.ckpt", step, {}, explicit=True
    )


def table(run: Path) -> dict[int, dict[str, float]]:
    rows = MetricsCSV(run / "evaluations.csv").rows()
    return {
        int(row["step"]): {k: float(v) for k, v in row.items() if v and k != "step"} for row in rows
    }


def events(run: Path):
    pytest.importorskip("tensorboard")
    return tensorboard_metrics(run)[0]


def expected(run: Path):
    """Every value of the record and of the table of reports."""
    return metrics(run) | {
        (step, k, np.float32(v)): 1 for step, row in table(run).items() for k, v in row.items()
    }


def test_figures_are_those_of_the_report():
    assert figures(NUMBERS) == FIGURES
    no_classes = {k: v for k, v in NUMBERS.items() if k not in ("class_accuracy", "frequencies")}
    assert figures(no_classes).keys() == FIGURES.keys() - {
        "evaluation/class_accuracy",
        "evaluation/worst_difference",
    }


def test_a_step_has_one_row_and_that_is_the_newest(tmp_path):
    keep(tmp_path, 9, {"evaluation/kid": 0.5, "evaluation/fd": 2.0})
    keep(tmp_path, 3, {"evaluation/kid": 0.25})
    keep(tmp_path, 9, {"evaluation/kid": 0.125, "evaluation/fid": 7.0})
    assert list(table(tmp_path)) == [3, 9]
    assert table(tmp_path) == {
        3: {"evaluation/kid": 0.25},
        9: {"evaluation/kid": 0.125, "evaluation/fid": 7.0},
    }
    assert [row["step"] for row in recorded_rows(tmp_path, 8)[0]] == ["3"]


def test_reports_at_the_same_time_lose_no_row(tmp_path):
    writers = [
        FORK.Process(target=keep, args=(tmp_path, step, {"evaluation/kid": 1.0}))
        for step in range(12)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert list(table(tmp_path)) == list(range(12))


def test_both_mirrors_show_a_report_without_another_training(nobody, tmp_path):
    pytest.importorskip("tensorboard")
    run, config = run_of(tmp_path, ("wandb", "tensorboard"))
    keep(run, 2, {"evaluation/kid": 0.5})
    said = record(run, entry(run, 4), config, NUMBERS)
    assert f"figures are in {run / 'evaluations.csv'}, and in wandb and tensorboard" in said
    assert table(run)[4] == FIGURES
    assert wandb_metrics(run) == expected(run) == events(run)
    shown, _ = segment(run)
    assert shown.run_id == (run / "wandb" / "id-0").read_text()
    assert {item.key: json.loads(item.value_json) for item in shown.config.update}["trainer"] == {
        "max_steps": 4
    }
    record(run, entry(run, 4), config, {**NUMBERS, "n": 48})  # again, in the place of the first
    assert (4, "evaluation/n", np.float32(48)) in events(run)
    assert wandb_metrics(run) == expected(run) == events(run)


def test_what_a_server_has_is_not_written_again_but_summed_up(nobody, tmp_path):
    """As wandb's history cannot be written once it has gone on, the summary holds what a report
    says of before.
    """
    mirror = Wandb(directory=tmp_path)
    mirror.start()
    mirror.first = 5
    for step in (3, 4, 6):
        mirror.write(step, {"train/loss": 1.0, "evaluation/kid": step / 8}, {})
    mirror.close(True)
    assert [row["_step"] for row in segment(tmp_path)[1]] == [6]
    assert summaries(tmp_path)[:2] == [{"evaluation/kid": 0.375}, {"evaluation/kid": 0.5}]


def summaries(run: Path) -> list[dict[str, float]]:
    from wandb.proto.wandb_internal_pb2 import Record

    records = [Record.FromString(data) for data in frames(segment_file(run).read_bytes())]
    updates = [list(r.summary.update) for r in records if r.WhichOneof("record_type") == "summary"]
    return [
        {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in update}
        for update in updates
    ]


def hold(run, ready):
    held = Run(run).lock()
    ready.send(True)
    ready.recv()
    held.close()


def test_while_it_trains_the_mirrors_are_left_to_training(tmp_path):
    pytest.importorskip("tensorboard")
    run, config = run_of(tmp_path)
    ours, theirs = FORK.Pipe()
    trainer = FORK.Process(target=hold, args=(run, theirs))
    trainer.start()
    assert ours.recv()
    said = record(run, entry(run, 4), config, NUMBERS)
    ours.send("end")
    trainer.join()
    assert "the run is being trained, so its loggers show them when training starts next" in said
    assert table(run) == {4: FIGURES}
    assert not (run / "tensorboard").exists()
    assert "in tensorboard" in record(run, entry(run, 4), config, NUMBERS)
    assert events(run) == expected(run)


def wait_for(run, ready):
    ready.send(True)
    Run(run).lock().close()
    ready.send(True)


def test_training_waits_for_a_report_and_is_not_refused(tmp_path):
    """Control: by whom it is not held briefly, it is refused; test_lock.py."""
    held = Run(tmp_path, brief=True).lock()
    ours, theirs = FORK.Pipe()
    trainer = FORK.Process(target=wait_for, args=(tmp_path, theirs))
    trainer.start()
    assert ours.recv()
    assert not ours.poll(0.5)
    held.close()
    assert ours.recv()
    trainer.join()
    assert trainer.exitcode == 0


def test_a_copied_run_leaves_the_one_it_was_copied_from_alone(tmp_path):
    pytest.importorskip("tensorboard")
    run, config = run_of(tmp_path)
    record(run, entry(run, 4), config, NUMBERS)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    copy = tmp_path / "elsewhere" / "copy"
    shutil.copytree(run, copy)
    record(copy, entry(copy, 2), config, NUMBERS)
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert events(copy) == expected(copy)
    assert list(table(copy)) == [2, 4]


REFUSED = {
    "os.system": {"_target_": "os.system", "directory": "RUN"},
    "is not run": {"_target_": f"{LOGGERS}mirror.CONSOLE", "directory": "RUN"},
    "is not in that of the run": {
        "_target_": f"{LOGGERS}tensorboard.Tensorboard",
        "directory": "RUN/../other",
    },
    "is not code": {"_target_": f"{LOGGERS}tensorboard.Tensorboard", "directory": "${oc.env:HOME}"},
    "directory": {"_target_": f"{LOGGERS}tensorboard.Tensorboard"},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_checkpoint_does_not_choose_what_is_run_or_written(reason, tmp_path, caplog):
    pytest.importorskip("tensorboard")
    run, config = run_of(tmp_path)
    node = {k: v.replace("RUN", str(run)) for k, v in REFUSED[reason].items()}
    config["logger"] = {"odd": node, **config["logger"]}
    [mirror] = mirrors_of(config, run)
    assert isinstance(mirror, Tensorboard)
    assert "logger.odd does not show the figures" in caplog.text
    assert reason in caplog.text
    assert not (tmp_path / "runs" / "other").exists()


def test_nothing_costs_the_report(tmp_path, caplog):
    pytest.importorskip("tensorboard")
    run, config = run_of(tmp_path)
    (run / "tensorboard").write_text("a file where a directory should be")
    said = record(run, entry(run, 4), config, NUMBERS)
    assert said.endswith("evaluations.csv")
    assert "tensorboard is given up" in caplog.text
    assert "no checkpoint of" in record(run, entry(tmp_path, 3), config, NUMBERS)
    (run / "evaluations.csv").write_bytes(b"step,\xff\xfe\n3,x\n")
    assert recorded_rows(run)[0] == MetricsCSV(run / "metrics.csv").rows()
    assert "evaluations.csv cannot be read" in caplog.text
    assert record(run, entry(run, 4), config, NUMBERS) == "its figures are in report.json alone"
    (run / "evaluations.csv").write_text("step,evaluation/kid\n3,much\n")
    assert recorded_rows(run)[0] == MetricsCSV(run / "metrics.csv").rows()


def test_a_branch_takes_its_reports_along(tmp_path):
    run, _ = run_of(tmp_path)
    keep(run, 2, {"evaluation/kid": 0.5})
    keep(run, 4, {"evaluation/kid": 0.25})
    store = Store(run / "checkpoints")
    metrics = MetricsCSV(run / "metrics.csv")
    archive_newer_checkpoints(
        run, store, metrics, entry(run, 2)
    )  # no later checkpoint: what was cut off comes again, reports do not
    assert list(table(run)) == [2, 4]
    (run / "checkpoints" / "step-00000004").mkdir(parents=True)
    assert store.steps() == [4]
    archive_newer_checkpoints(run, store, metrics, entry(run, 2))
    assert list(table(run)) == [2]
    assert table(run / "abandoned" / "001") == {4: {"evaluation/kid": 0.25}}


def test_a_lock_that_is_not_brief_refuses(tmp_path):
    ours, theirs = FORK.Pipe()
    other = FORK.Process(target=hold, args=(tmp_path, theirs))
    other.start()
    assert ours.recv()
    with pytest.raises(AlreadyRunningError, match=rf"process {other.pid}"):
        Run(tmp_path, brief=True).lock()
    ours.send("end")
    other.join()
    assert os.path.exists(tmp_path / ".lock")
