"""A run's directory: what a resume at an older step puts aside, and the numbers of attempts."""

import pytest

from exact_resume.resume import ResumePoint
from exact_resume.run import Run


@pytest.fixture
def run(tmp_path):
    """A run with three checkpoints, a record and the files of their steps."""
    run = Run(tmp_path / "run")
    for step in (2, 4, 6):
        run.store.commit(step, {"global_step": step})
        (run.home / "samples").mkdir(exist_ok=True)
        (run.home / "samples" / f"step-{step:08d}.png").write_text(str(step))
    for step in range(1, 8):
        run.metrics.log_metrics({"train/loss": step / 10}, step)
    return run


def point(run, step):
    return ResumePoint(run.store.state(step), step, {}, explicit=True)


def steps(table):
    return [int(row["step"]) for row in table.rows()]


def test_everything_newer_than_the_resume_point_is_put_aside(run):
    run.archive_newer(point(run, 2))
    aside = Run(run.home / "abandoned" / "001")
    assert run.store.steps() == [2]
    assert sorted(path.name for path in aside.home.glob("step-*")) == [
        "step-00000004",
        "step-00000006",
    ]
    assert steps(run.metrics) == [1, 2]
    assert steps(aside.metrics) == [3, 4, 5, 6, 7]
    names = sorted(path.name for path in (aside.home / "samples").iterdir())
    assert names == ["step-00000004.png", "step-00000006.png"]


def test_without_newer_checkpoints_only_the_record_is_cut(run):
    run.archive_newer(point(run, 6))
    assert run.store.steps() == [2, 4, 6]
    assert steps(run.metrics) == [1, 2, 3, 4, 5, 6]
    assert not (run.home / "abandoned").exists()


def test_a_checkpoint_from_elsewhere_puts_everything_aside(run, tmp_path):
    other = Run(tmp_path / "other")
    other.store.commit(4, {"global_step": 4})
    run.archive_newer(point(other, 4))
    assert run.store.steps() == []
    assert steps(run.metrics) == []
    assert (run.home / "abandoned" / "001" / "step-00000002").is_dir()
    run.store.commit(2, {"global_step": 2})
    run.archive_newer(None)
    assert (run.home / "abandoned" / "002" / "step-00000002").is_dir()


def test_attempts_are_numbered(run):
    assert [run.next_attempt().name for _ in range(2)] == ["001", "002"]
    (run.home / "attempts" / "007").mkdir()
    assert run.next_attempt().name == "008"


def test_the_newest_step(run, tmp_path):
    assert run.newest_step() == 6
    assert Run(tmp_path / "nothing").newest_step() == -1
