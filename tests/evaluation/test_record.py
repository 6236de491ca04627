"""The numbers of a report become a row beside the run's record, and nothing costs the report."""

import multiprocessing
from pathlib import Path

from exact_resume.metrics import MetricsCSV, read_rows
from exact_resume.replay import recorded_rows
from exact_resume.resume import ResumePoint
from exact_resume.run import Run
from sturdy.evaluation.record import main_numbers, record, write_row

FORK = multiprocessing.get_context("fork")
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
MAIN = {
    "evaluation/n": 24,
    "evaluation/kid": 0.125,
    "evaluation/fd": 3.5,
    "evaluation/recall": 0.5,
    "evaluation/copies_pixels": 0.25,
    "evaluation/class_accuracy": 0.75,
    "evaluation/worst_difference": 37.5,
}


def make_run(tmp: Path) -> Path:
    """Make the directory of a run of four steps."""
    run = tmp / "runs" / "mine"
    run.mkdir(parents=True)
    for step in range(1, 5):
        MetricsCSV(run / "metrics.csv").log_metrics({"train/loss": 1 / step}, step)
    return run


def point(run: Path, step: int) -> ResumePoint:
    return ResumePoint(run / "checkpoints" / f"step-{step:08d}" / "state.ckpt", step, {}, True)


def table(run: Path) -> dict[int, dict[str, float]]:
    return {
        int(row["step"]): {k: float(v) for k, v in row.items() if v and k != "step"}
        for row in read_rows(run / "evaluations.csv")
    }


def test_main_numbers_are_those_of_the_report():
    assert main_numbers(NUMBERS) == MAIN
    no_classes = {k: v for k, v in NUMBERS.items() if k not in ("class_accuracy", "frequencies")}
    assert main_numbers(no_classes).keys() == MAIN.keys() - {
        "evaluation/class_accuracy",
        "evaluation/worst_difference",
    }


def test_a_column_is_always_in_the_same_features():
    efficientnet = {"held_out_samples": {"kid": 0.25}, "held_out_floor": {"kid": 9.0}}
    second = main_numbers({**NUMBERS, "features": "embedded", "quality_efficientnet": efficientnet})
    assert second == {**MAIN, "evaluation/efficientnet_kid": 0.25}
    first = main_numbers({**NUMBERS, "features": "efficientnet", "quality": efficientnet})
    assert first["evaluation/efficientnet_kid"] == 0.25
    assert "evaluation/kid" not in first


def test_a_report_becomes_a_row(tmp_path):
    run = make_run(tmp_path)
    assert f"its figures are in {run / 'evaluations.csv'}" in record(run, point(run, 4), NUMBERS)
    assert table(run) == {4: MAIN}
    record(run, point(run, 4), {**NUMBERS, "n": 48})  # with another n: another row
    assert [row["evaluation/n"] for row in read_rows(run / "evaluations.csv")] == ["24", "48"]


def test_the_newest_row_of_a_step_is_kept(tmp_path):
    write_row(tmp_path, 9, {"evaluation/kid": 0.5, "evaluation/fd": 2.0})
    write_row(tmp_path, 3, {"evaluation/kid": 0.25})
    write_row(tmp_path, 9, {"evaluation/kid": 0.125, "evaluation/fid": 7.0})
    assert list(table(tmp_path)) == [3, 9]
    assert table(tmp_path) == {
        3: {"evaluation/kid": 0.25},
        9: {"evaluation/kid": 0.125, "evaluation/fid": 7.0},
    }
    assert [row["step"] for row in recorded_rows(tmp_path, 8)[0]] == ["3"]


def test_reports_at_the_same_time_lose_no_row(tmp_path):
    writers = [
        FORK.Process(target=write_row, args=(tmp_path, step, {"evaluation/kid": 1.0}))
        for step in range(12)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert list(table(tmp_path)) == list(range(12))


def test_nothing_costs_the_report(tmp_path, caplog):
    run = make_run(tmp_path)
    assert "no checkpoint of" in record(run, point(tmp_path, 3), NUMBERS)
    (run / "evaluations.csv").write_bytes(b"step,\xff\xfe\n3,x\n")
    assert recorded_rows(run)[0] == read_rows(run / "metrics.csv")
    assert "evaluations.csv cannot be read" in caplog.text
    assert record(run, point(run, 4), NUMBERS) == "its figures are in report.json alone"
    (run / "evaluations.csv").write_text("step,evaluation/kid\n3,much\n")
    assert recorded_rows(run)[0] == read_rows(run / "metrics.csv")


def test_an_archived_branch_takes_its_reports_along(tmp_path):
    home = make_run(tmp_path)
    write_row(home, 2, {"evaluation/kid": 0.5})
    write_row(home, 4, {"evaluation/kid": 0.25})
    run = Run(home)
    run.archive_newer(point(home, 2))  # no later checkpoint: reports stay
    assert list(table(home)) == [2, 4]
    (home / "checkpoints" / "step-00000004").mkdir(parents=True)
    run.archive_newer(point(home, 2))
    assert list(table(home)) == [2]
    assert table(home / "abandoned" / "001") == {4: {"evaluation/kid": 0.25}}
