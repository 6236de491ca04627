"""Which checkpoints a run has at its end, in real fits."""

import pytest
import torch
from torch.utils.data import DataLoader

from exact_resume.callbacks.checkpoint import Checkpoint
from exact_resume.callbacks.record import Record
from exact_resume.checkpoint.store import SCORE, Store
from exact_resume.metrics import MetricsCSV
from tiny_module import Stream, batch, fit, make, save, trainer

NAN, INF = float("nan"), float("inf")


VALIDATED = {
    "fingerprint": {"config": {"trainer.val_check_interval": 2, "trainer.limit_val_batches": 1.0}}
}


def run(directory, scores, *, steps=9, entry=None, facts=VALIDATED, **settings):
    """Validate every second step, with the given ``scores`` one after another; returns the steps
    that are kept.
    """
    module, metrics, values = make(), MetricsCSV(directory / "metrics.csv"), iter(scores)
    module.validation_step = lambda *_: module.held_out.update({0: torch.tensor([next(values)])})
    t = trainer(
        directory / "checkpoints",
        steps,
        Record(metrics),
        Checkpoint(every_n_minutes=None, **settings),
        logger=metrics,
        enable_checkpointing=True,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=2,
    )
    t.strategy.checkpoint_io.metadata = lambda checkpoint: facts
    start = int(entry.parent.name.removeprefix("step-")) if entry else 0
    validation = DataLoader([batch(0)], batch_size=None)
    t.fit(
        module,
        DataLoader(Stream(start), batch_size=None),
        validation,
        ckpt_path=entry,
        weights_only=True,
    )
    store = Store(directory / "checkpoints")
    assert all(store.verify(step) for step in store.steps())
    return store.steps()


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"every_n_train_steps": 3, "keep_last": 1}, [6, 9]),  # the best, and the end
        ({"every_n_train_steps": 3, "keep_last": 1, "keep_best": 0}, [9]),
        ({"every_n_train_steps": 3, "keep_last": 2, "keep_best": 2}, [6, 8, 9]),
        ({"every_n_train_steps": 1, "keep_last": 3, "keep_best": 1}, [6, 7, 8, 9]),
        ({"every_n_train_steps": 1, "keep_last": 1, "keep_best": 1, "keep_every": 4}, [4, 6, 8, 9]),
        ({"every_n_train_steps": None, "keep_last": 1, "keep_best": 1}, [6, 9]),
        ({"every_n_train_steps": None, "keep_last": 1, "keep_best": 1, "mode": "max"}, [4, 9]),
        ({"every_n_train_steps": None, "keep_last": 1, "keep_best": 0}, [9]),
    ],
)
def test_the_newest_the_best_and_every_nth_are_kept(settings, kept, tmp_path):
    """The first score is NaN and must neither be best nor hide what is."""
    assert run(tmp_path, [NAN, 3.0, 1.0, 2.0], **settings) == kept


def test_without_a_finite_score_the_newest_are_kept(tmp_path):
    assert run(
        tmp_path, [NAN, INF, -INF, NAN], every_n_train_steps=1, keep_last=2, keep_best=2
    ) == [8, 9]


def test_the_best_so_far_outlives_a_restart(tmp_path):
    assert run(tmp_path, [1.0, 3.0], steps=5, every_n_train_steps=1, keep_last=1) == [2, 5]
    entry = Store(tmp_path / "checkpoints").state(5)
    assert run(tmp_path, [2.0, 4.0], steps=9, entry=entry, every_n_train_steps=3, keep_last=1) == [
        2,
        9,
    ]


def again(directory, scores, **settings):
    """Go on from the newest checkpoint."""
    store = Store(directory / "checkpoints")
    entry = store.state(store.steps()[-1])
    return run(directory, scores, entry=entry, every_n_train_steps=1, keep_last=1, **settings)


def test_the_best_outlives_the_loss_of_the_record(tmp_path, caplog):
    assert run(tmp_path, [1.0, 3.0], steps=5, every_n_train_steps=1, keep_last=1) == [2, 5]
    assert Store(tmp_path / "checkpoints").scores("val/loss") == {2: 1.0}
    (tmp_path / "metrics.csv").unlink()
    assert again(tmp_path, [2.0, 4.0], steps=9) == [2, 9]
    assert "may be the best" not in caplog.text


def test_what_may_be_the_best_is_not_deleted_where_no_score_is_known(tmp_path, caplog):
    assert run(tmp_path, [1.0, 3.0], steps=5, every_n_train_steps=1, keep_last=1) == [2, 5]
    (tmp_path / "metrics.csv").unlink()
    (Store(tmp_path / "checkpoints").path(2) / SCORE).unlink()
    assert again(tmp_path, [2.0, 4.0], steps=9) == [2, 6, 9]
    assert "val/loss of step 2 is neither in" in caplog.text


def test_control_where_it_was_not_to_be_validated_an_older_one_is_deleted(tmp_path):
    assert run(tmp_path, [1.0, 3.0], steps=5, every_n_train_steps=1, keep_last=1, facts={}) == [
        2,
        5,
    ]
    (tmp_path / "metrics.csv").unlink()
    (Store(tmp_path / "checkpoints").path(2) / SCORE).unlink()
    assert again(tmp_path, [2.0, 4.0], steps=9, facts={}) == [6, 9]


def test_a_checkpoint_without_its_score_gets_it_from_the_record(tmp_path):
    """As one of an older version, or of a process that was killed before it could write it."""
    run(tmp_path, [1.0, 3.0], steps=5, every_n_train_steps=1, keep_last=1)
    (Store(tmp_path / "checkpoints").path(2) / SCORE).unlink()
    assert again(tmp_path, [2.0, NAN], steps=9) == [2, 9]
    assert Store(tmp_path / "checkpoints").scores("val/loss") == {2: 1.0}


def test_a_run_entered_from_elsewhere_keeps_its_entry_from_the_start(tmp_path):
    t, _ = fit(make(), tmp_path / "other" / "checkpoints", steps=3)
    kept = run(
        tmp_path / "mine",
        [1.0],
        steps=5,
        entry=save(t),
        every_n_train_steps=None,
        keep_last=5,
        keep_best=0,
    )
    assert kept == [3, 5]


def test_time_is_a_reason_to_save(tmp_path):
    metrics = MetricsCSV(tmp_path / "metrics.csv")
    checkpoint = Checkpoint(every_n_train_steps=None, every_n_minutes=0, keep_last=9)
    t = trainer(
        tmp_path / "checkpoints",
        3,
        Record(metrics),
        checkpoint,
        logger=metrics,
        enable_checkpointing=True,
    )
    t.fit(make(), DataLoader(Stream(0), batch_size=None))
    assert Store(tmp_path / "checkpoints").steps() == [1, 2, 3]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"mode": "small"}, "min or max"),
        ({"keep_last": 0}, "at least 1"),
        ({"keep_best": -1}, "keep_best=-1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, reason):
    with pytest.raises(ValueError, match=reason):
        Checkpoint(**settings)
