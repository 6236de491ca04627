"""How often a run with ``every="auto"`` saves: the formula, real saves, two processes, a resume."""

import json
import logging
import math
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

import exact_resume.checkpoint.store as store_module
from exact_resume import distributed
from exact_resume.__main__ import main
from exact_resume.callbacks.checkpoint import Checkpoint
from exact_resume.callbacks.record import Record
from exact_resume.checkpoint.store import Store
from exact_resume.checkpoint.writer import HostBuffers
from exact_resume.checkpoint_interval import SAVE_COST, SaveInterval, optimal_interval
from exact_resume.metrics import MetricsCSV
from runs import differences
from tiny_module import Stream, make, trainer
from worlds import World, finish

OFTEN = 0.001  # hours between failures, so that a save is due after some hundredths of a second
STEP = 0.005  # seconds that a step takes at least
AUTO = {"every": "auto", "mean_time_between_failures": OFTEN, "keep_last": 1000}


def useful(interval, blocked, lost=0.0):
    """The useful part of the time, where failures come once in the unit of time on average."""
    return interval * np.exp(-lost) / np.expm1(interval + blocked)


@pytest.mark.parametrize("blocked", [1e-7, 1e-5, 1e-3, 0.1, 0.5])
@pytest.mark.parametrize("lost", [0.0, 0.3])
def test_the_interval_is_where_the_expected_loss_is_least(blocked, lost):
    intervals = np.geomspace(blocked / 10, 10, 200_001)
    best = intervals[useful(intervals, blocked, lost).argmax()]
    found = optimal_interval(blocked, 1.0)
    assert found == pytest.approx(best, rel=0.02)
    assert useful(found, blocked, lost) == pytest.approx(useful(best, blocked, lost), rel=1e-4)
    for wrong in (found / 2, found * 2):  # the control
        assert useful(wrong, blocked, lost) < useful(found, blocked, lost)


def test_rare_failures_give_the_square_root():
    assert optimal_interval(0.3, 86400) == pytest.approx(math.sqrt(2 * 0.3 * 86400), rel=2e-3)


def test_a_save_that_costs_more_than_failures_allow():
    assert optimal_interval(3.0, 1.0) == 1.0


def known(blocked, durable, hours=24.0):
    interval = SaveInterval(hours)
    interval.earlier = blocked, durable
    return interval


def test_bounds_and_the_line_of_the_log():
    assert known(0.37, 1.1).describe() == (
        "saves every 4.2 min: a save costs 0.4 s and is durable after 1.1 s, and a failure is "
        "expected every 24 h (auto)"
    )
    assert known(0.37, 900.0).seconds() == 900  # the disk takes that long
    assert known(300.0, 400.0, 2000).seconds() == 3600


def test_no_save_begins_before_the_last_one_is_durable():
    interval = known(0.001, 0.001)
    with interval.measure():
        pass
    assert not interval.is_due(1000)
    assert interval.is_due(3600)  # but an hour is too much
    interval.note_durable()
    assert interval.is_due(1000)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"every": "sometimes"}, "every=sometimes must be auto"),
        ({"every": 100}, "every=100 must be auto"),
        ({"every": "auto", "mean_time_between_failures": 0}, "must be a number of hours above 0"),
        ({"every": "auto", "mean_time_between_failures": "24"}, "mean_time_between_failures=24"),
        ({"every": "auto", "mean_time_between_failures": math.nan}, "mean_time_between_failures"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, reason):
    with pytest.raises(ValueError, match=reason):
        Checkpoint(**settings)


class Slow(Callback):
    """Makes every step take at least ``STEP`` seconds, as with a larger network."""

    def on_train_batch_start(self, *args):
        time.sleep(STEP)


def train(directory, steps=200, **settings):
    """Return the steps that were saved, all of which are kept."""
    directory.mkdir(exist_ok=True)
    metrics = MetricsCSV(directory / "metrics.csv")
    t = trainer(
        directory / "checkpoints",
        steps,
        Slow(),
        Record(metrics),
        Checkpoint(**{"every_n_minutes": None, **settings}),
        logger=metrics,
        enable_checkpointing=True,
        log_every_n_steps=10,
    )
    with t.strategy.checkpoint_io:  # save in the background, as a run does
        t.fit(make(), DataLoader(Stream(0), batch_size=None))
    return Store(directory / "checkpoints").steps()


@contextmanager
def slow_disk(monkeypatch, seconds):
    """Let each file of a checkpoint take ``seconds`` longer to be written."""
    write = store_module.open_durable

    @contextmanager
    def slowly(path):
        with write(path) as file:
            time.sleep(seconds)
            yield file

    with monkeypatch.context() as patch:
        patch.setattr(store_module, "open_durable", slowly)
        yield


@contextmanager
def slow_copy(monkeypatch, seconds):
    """Let training wait ``seconds`` longer for each save."""
    copy = HostBuffers.copy

    def slowly(self, state):
        time.sleep(seconds)
        return copy(self, state)

    with monkeypatch.context() as patch:
        patch.setattr(HostBuffers, "copy", slowly)
        yield


def test_a_save_that_costs_more_is_made_less_often(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    quick = train(tmp_path / "quick", **AUTO)
    assert len(quick) > 3
    lines = [line for line in caplog.messages if line.startswith("saves every ")]
    assert 1 <= len(lines) < len(quick)
    with slow_disk(monkeypatch, 0.7):  # two files, so that it is durable after 1.4 s
        assert len(train(tmp_path / "disk", **AUTO)) < len(quick)
    with slow_copy(monkeypatch, 0.3):
        assert len(train(tmp_path / "copy", **AUTO)) < len(quick)
    costs = [json.loads((tmp_path / run / SAVE_COST).read_bytes()) for run in ("disk", "copy")]
    assert costs[0]["durable"] > 1.4 > costs[0]["blocked"]
    assert costs[1]["blocked"] > 0.3


def test_control_a_number_of_steps_knows_no_cost(tmp_path, monkeypatch):
    quick = train(tmp_path / "quick", 20, every_n_train_steps=5, keep_last=1000)
    with slow_disk(monkeypatch, 0.02):
        slow = train(tmp_path / "slow", 20, every_n_train_steps=5, keep_last=1000)
    assert quick == slow == [5, 10, 15, 20]
    assert not (tmp_path / "slow" / SAVE_COST).exists()


def test_steps_that_are_kept_for_good_are_saved(tmp_path):
    rarely = AUTO | {"mean_time_between_failures": 24}
    assert train(tmp_path, 10, **rarely, keep_every=4, every_n_train_steps=3) == [4, 8, 10]


def test_the_cost_of_an_earlier_attempt_counts_from_the_start(tmp_path, caplog):
    """The stored cost allows no save in less than 3.6 s, which is longer than the run takes."""
    caplog.set_level(logging.INFO)
    cost = {"blocked": 100.0, "durable": 0.1}
    (tmp_path / SAVE_COST).write_text(json.dumps(cost))
    assert train(tmp_path, 40, **AUTO) == [40]
    assert "saves every 3.6 s: a save costs 1.7 min" in caplog.text
    assert json.loads((tmp_path / SAVE_COST).read_bytes())["blocked"] < 1  # the run's own by now


@pytest.mark.parametrize("text", [None, "", "{}", '{"blocked": NaN, "durable": 1}', "[1]", '"x"'])
def test_control_without_an_earlier_cost_a_save_comes_soon(tmp_path, text):
    if text is not None:
        (tmp_path / SAVE_COST).write_text(text)
    assert len(train(tmp_path, 40, **AUTO)) > 1


def test_status_says_the_interval(tmp_path, capsys):
    train(tmp_path, 10, **AUTO)
    (tmp_path / SAVE_COST).write_text(
        json.dumps({"blocked": 0.37, "durable": 1.1, "mean_time_between_failures": 24})
    )
    main(["status", str(tmp_path)])
    assert "saves every 4.2 min: a save costs 0.4 s" in capsys.readouterr().out
    (tmp_path / SAVE_COST).write_text("{")
    main(["status", str(tmp_path)])
    assert "saves every" not in capsys.readouterr().out


def note_saves(tmp: Path, name: str, *, all_decide: bool = False):
    """Return a ``first`` of ``World`` that notes which steps each process saves.

    Rank 1 wants to save at every step. With ``all_decide`` it is heard.
    """

    def prepare(rank: int) -> None:
        save = Checkpoint.save
        file = (tmp / f"{name}-{rank}.saves").open("w", buffering=1)

        def noting(self, trainer):
            if trainer.global_step != self.saved_step:
                file.write(f"{trainer.global_step}\n")
            save(self, trainer)

        Checkpoint.save = noting
        if all_decide:
            Checkpoint._is_late = lambda self: distributed.all_reduce_max(self.interval.is_due(0))
        if rank == 1:
            SaveInterval.is_due = lambda self, elapsed: True

    return prepare


def saves(tmp: Path, name: str, rank: int) -> list[int]:
    return [int(line) for line in (tmp / f"{name}-{rank}.saves").read_text().split()]


def test_two_processes_save_together_and_no_bit_depends_on_it(tmp_path: Path) -> None:
    auto = "callbacks.checkpoint.every=auto"
    soon = "callbacks.checkpoint.mean_time_between_failures=0.01"
    finish(tmp_path, "fixed", 2)
    killed = World(tmp_path, "auto", 2, auto, soon, first=note_saves(tmp_path, "often"))
    killed.until(5).kill().wait()
    again = finish(tmp_path, "auto", 2, auto, first=note_saves(tmp_path, "rarely"))
    assert differences(tmp_path, "fixed", "auto") == []
    assert "saves every " in again.output(0)
    often = [saves(tmp_path, "often", rank) for rank in (0, 1)]
    rarely = [saves(tmp_path, "rarely", rank) for rank in (0, 1)]
    assert often[0][: len(often[1])] == often[1][: len(often[0])]  # the kill may cut one of them
    assert rarely[0] == rarely[1]
    assert set(rarely[0][1:]) <= {8, 12}  # after the first step: a new best, and the end


@pytest.mark.slow
def test_control_if_rank_1_decided_it_would_save_every_step(tmp_path: Path) -> None:
    finish(
        tmp_path,
        "all",
        2,
        "callbacks.checkpoint.every=auto",
        first=note_saves(tmp_path, "all", all_decide=True),
    )
    assert saves(tmp_path, "all", 0) == [*range(1, 13)]
