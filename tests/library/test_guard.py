"""Numbers that are not finite: in real processes, and in real fits of a tiny module."""

import json
import signal
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from exact_resume.callbacks.checkpoint import Checkpoint
from exact_resume.callbacks.nan_guard import NanGuard, batch_positions
from exact_resume.callbacks.preemption import AgreeOnSignal, SaveOnSignal
from exact_resume.callbacks.record import Record
from exact_resume.checkpoint.store import Store, load_state
from exact_resume.metrics import MetricsCSV
from exact_resume.permutation import InfiniteBatchSampler
from exact_resume.reduction import own_shards
from exact_resume.signals import EXIT_RESUMABLE, Preemption
from exact_resume.skips import NonFiniteLossError, SkipLog
from runs import differences, kill_at, losses, train
from sturdy.data.datamodule import folder_data
from sturdy.data.images import Batch
from tiny_module import Stream, batch, make, trainer

# in batches of 8: the very first, then two in a row, which both would make step 6
POISON = "poison:3,50,57"
EVERYWHERE = f"poison:{','.join(map(str, range(0, 800, 8)))}"
NAN, INF = float("nan"), float("inf")


def skips(tmp, name):
    return SkipLog(tmp / "runs" / name / "skips.jsonl")


def all_finite(tmp, name):
    """Whether everything that the run has saved or recorded is."""
    store = Store(tmp / "runs" / name / "checkpoints")
    weights = [
        w for step in store.steps() for w in load_state(store.state(step))["state_dict"].values()
    ]
    values = [float(value) for row in losses(tmp, name) for value in row if value]
    return all(w.isfinite().all() for w in weights) and torch.tensor(values).isfinite().all()


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory):
    """A directory with the poisoned run ``whole``, which nothing else disturbed, and what it
    printed.
    """
    tmp = tmp_path_factory.mktemp("poisoned")
    return tmp, train(tmp, "whole", sabotage=POISON).stdout


def test_bad_batches_are_left_out_and_all_later_ones_come_earlier(poisoned):
    tmp, output = poisoned
    assert [(s.step, s.position, s.size) for s in skips(tmp, "whole").entries] == [
        (1, 0, 8),
        (6, 48, 8),
        (6, 56, 8),
    ]
    for skip in skips(tmp, "whole").entries:
        assert skip.reason == "train/loss was nan and train/grad_norm nan"
        assert len(skip.images) == 8
    taken = {}
    for line in output.splitlines():
        if line.startswith("batch "):
            step, position = line.removeprefix("batch ").split(": ")
            taken[int(step)] = int(position)  # what came last is what stays
    assert taken == {
        1: 8,
        2: 16,
        3: 24,
        4: 32,
        5: 40,
        **{step: 8 * step + 16 for step in range(6, 13)},
    }
    assert Store(tmp / "runs" / "whole" / "checkpoints").last()["position"] == 8 * 12 + 24
    assert "step 6, positions 48 to 55: train/loss was nan" in output
    assert output.count("back to the last checkpoint") == 3
    assert sum(line.count("; fresh, to step 12") for line in output.splitlines()) == 2
    assert output.count("resumed from step 4, to step 12 (bitwise") == 2, (
        "or it lost more than it had to"
    )
    assert "finished at step 12" in output
    assert len(losses(tmp, "whole")) == 12 + 3
    assert all_finite(tmp, "whole")


@pytest.mark.slow
def test_killed_before_and_after_a_skip_it_ends_in_the_same_bits(poisoned):
    """Killed where the last skip is recorded: once before it is there, once after; then late, and
    with a worker.
    """
    tmp, _ = poisoned
    for moment, known in (("before", 2), ("after", 3)):
        sabotage = POISON.replace("poison", f"poison-and-die-{moment}-the-skip")
        train(tmp, "killed", "data.num_workers=1", sabotage=sabotage, code=-signal.SIGKILL)
        assert len(skips(tmp, "killed").entries) == known
    output = train(tmp, "killed", sabotage=POISON).stdout
    assert "resumed from step 4, to step 12 (bitwise" in output
    assert "back to the last checkpoint" not in output
    assert differences(tmp, "whole", "killed") == []
    assert skips(tmp, "killed").path.read_bytes() == skips(tmp, "whole").path.read_bytes()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("shards", "processes"), [(1, 1), (4, 1), (4, 2), (8, 2), (8, 4), (4, 4)])
def test_every_process_knows_the_positions_of_the_whole_batch(shards, processes, interleaved):
    batch = np.arange(1003, 1003 + 16)
    for rank in range(processes):
        own = own_shards(shards, rank, processes, interleaved=interleaved)
        mine = batch.reshape(shards, -1)[own].reshape(-1)
        assert batch_positions(mine, rank, processes).tolist() == batch.tolist()


def test_a_run_that_is_bad_everywhere_is_given_up_with_a_report(tmp_path):
    done = train(tmp_path, "bad", "callbacks.guard.max_skips=2", sabotage=EVERYWHERE, code=1)
    assert (
        "training diverged 3 times, and callbacks.guard.max_skips=2 batches may be left out"
        in done.stderr
    )
    assert "Traceback" not in done.stderr
    report = done.stderr.split("left out:\n")[1].splitlines()
    for k in range(3):
        where, images = report[2 * k : 2 * k + 2]
        assert (
            f"step 1, positions {8 * k} to {8 * k + 7}: train/loss was nan and train/grad_norm nan"
            in where
        )
        assert len(images.removeprefix("        images ").split(", ")) == 8
    assert [s.position for s in skips(tmp_path, "bad").entries] == [0, 8], (
        "the last one was not left out"
    )
    assert Store(tmp_path / "runs" / "bad" / "checkpoints").steps() == []
    assert not (tmp_path / "runs" / "bad" / "samples").exists()
    assert not (tmp_path / "runs" / "bad" / "metrics.csv").exists()


@pytest.mark.slow
def test_control_without_the_guard_it_ends_at_the_first(tmp_path):
    done = train(tmp_path, "bare", "~callbacks.guard", sabotage="poison:50", code=1)
    assert "error: the weights are not finite at step 9, and are not saved" in done.stderr
    assert "Traceback" not in done.stderr
    assert Store(tmp_path / "runs" / "bare" / "checkpoints").steps()[-1] == 6
    assert not skips(tmp_path, "bare").path.exists()


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 5, 8, 10])
def test_killed_anywhere_it_ends_in_the_same_bits(step, poisoned):
    tmp, _ = poisoned
    name = f"killed-{step}"
    for _ in range(2):
        kill_at(tmp, name, step, "data.num_workers=1", sabotage=POISON)
    train(tmp, name, sabotage=POISON)
    assert differences(tmp, "whole", name) == []
    assert skips(tmp, name).path.read_bytes() == skips(tmp, "whole").path.read_bytes()


@pytest.mark.slow
def test_a_run_entered_from_a_path_skips_what_the_other_one_did(poisoned):
    """A checkpoint tells its true position, so that it may be continued without the other's
    ``skips.jsonl``.
    """
    tmp, _ = poisoned
    first = tmp / "runs" / "whole" / "checkpoints"
    for step in (9, 6):
        if step in Store(first).steps():
            origin = Store(first).path(step)
    train(tmp, "branch", f"ckpt_path={origin}", sabotage=POISON)
    assert not skips(tmp, "branch").entries, "all of them are behind"
    assert [
        name for name in differences(tmp, "whole", "branch") if not name.startswith("row")
    ] == []


@pytest.mark.slow
def test_a_bad_step_after_entering_from_a_path_goes_back_to_the_runs_own(tmp_path):
    train(tmp_path, "one", "trainer.max_steps=3")
    origin = tmp_path / "runs" / "one" / "checkpoints" / "step-00000003"
    output = train(tmp_path, "two", f"ckpt_path={origin}", sabotage="poison:24").stdout
    assert [(s.step, s.position) for s in skips(tmp_path, "two").entries] == [(4, 24)]
    assert "resumed from step 3" in output
    whole = train(tmp_path, "whole", sabotage="poison:24").stdout
    assert "finished" in whole
    assert [
        name for name in differences(tmp_path, "whole", "two") if not name.startswith("row")
    ] == []


@pytest.mark.slow
@pytest.mark.parametrize("position", [3, 50])
def test_a_signal_at_the_bad_step_loses_neither(position, tmp_path):
    train(tmp_path, "whole", sabotage=f"poison:{position}")
    done = train(tmp_path, "told", sabotage=f"poison-and-signal:{position}", code=EXIT_RESUMABLE)
    assert (
        "SIGTERM: went back to the last checkpoint. Run the same command to continue."
        in done.stdout
    )
    assert len(skips(tmp_path, "told").entries) == 1
    train(tmp_path, "told", sabotage=f"poison:{position}")
    assert differences(tmp_path, "whole", "told") == []


@pytest.mark.slow
@pytest.mark.parametrize("logger", ["tensorboard", "wandb"])
def test_mirrors_are_filled_up_after_going_back(logger, poisoned, monkeypatch):
    tmp, _ = poisoned
    pytest.importorskip(logger)
    monkeypatch.setenv("WANDB_MODE", "offline")
    done = train(tmp, logger, f"logger={logger}", sabotage=POISON)
    assert "is given up" not in done.stdout
    assert differences(tmp, "whole", logger) == []
    home = tmp / "runs" / logger
    assert len([*home.glob("tensorboard/events.*"), *home.glob("wandb/offline-run-*")]) == 1


def test_the_stream_without_the_batches_that_were_left_out():
    def first(n, *stream):
        return [positions[0] for positions in islice(InfiniteBatchSampler(*stream), n)]

    left_out = [
        (5, 28, 4),
        (2, 8, 4),
        (2, 12, 4),
        (2, 99, 4),
        (7, 28, 4),
    ]  # the last two never come by
    whole = first(9, 0, 4, 0, left_out)
    assert whole == [0, 4, 16, 20, 24, 32, 36, 40, 44]
    for step in range(9):
        assert first(9 - step, whole[step], 4, step, left_out) == whole[step:]
    assert first(4, 8, 4, 2, left_out) == whole[2:6], (
        "the checkpoint of step 2 does not know what comes at it"
    )
    assert first(3, 0, 4) == [0, 4, 8]


def test_the_names_are_of_the_images_that_were_trained_on(tmp_path):
    (tmp_path / "photos").mkdir()
    for k in range(10):
        Image.new("RGB", (8, 8), (20 * k, 0, 0)).save(tmp_path / "photos" / f"{k}.png")
    data = folder_data(
        root=str(tmp_path / "photos"), image_size=8, batch_size=4, cache=tmp_path / "cache"
    )
    data.trainer = SimpleNamespace(global_step=0)
    data.skips = [(1, 4, 4)]
    data.open()
    for x, _, positions in islice(data.train_dataloader(), 5):
        assert [20 * int(Path(name).stem) for name in data.names(positions)] == x[
            :, 0, 0, 0
        ].tolist()
    data.trainer.global_step = 3
    assert data.position == 16
    assert next(iter(data.train_dataloader())).positions[0] == 16


class Data(L.LightningDataModule):
    """The tiny batches, of which some are spoilt."""

    def __init__(self, spoil):
        super().__init__()
        self.spoil = spoil

    def train_dataloader(self):
        return DataLoader(Stream(0), batch_size=None)

    def val_dataloader(self):
        return DataLoader([batch(0)], batch_size=None)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        x, label, positions = batch
        return Batch(self.spoil(x, int(positions[0]) // 8 + 1), label, positions)

    def names(self, positions):
        return [f"image {int(p)}" for p in positions]


def fit(tmp, spoil, *callbacks, steps=9, every=9, validate=9, clip=1.0):
    """Fit with a guard that looks every ``every`` steps; what happens in which order is told by
    ``events``.
    """
    module, metrics, events = make(clip=clip), MetricsCSV(tmp / "metrics.csv"), []

    class Events(L.Callback):
        def on_validation_batch_end(self, trainer, *_):
            events.append(("validated", trainer.global_step))

    callbacks = callbacks or (Checkpoint(every_n_minutes=None, every_n_train_steps=3),)
    t = trainer(
        tmp / "checkpoints",
        steps,
        NanGuard(),
        Record(metrics),
        *callbacks,
        Events(),
        logger=metrics,
        enable_checkpointing=True,
        val_check_interval=validate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=every,
    )
    try:
        with pytest.raises(NonFiniteLossError) as error, t.strategy.checkpoint_io:
            t.fit(module, datamodule=Data(spoil))
    finally:
        t.strategy.checkpoint_io.close()
    return error.value.skip, events, Store(tmp / "checkpoints").steps(), metrics.rows()


def at(step, value):
    return lambda x, now: x * value if now == step else x


@pytest.mark.parametrize(
    ("value", "reason"), [(NAN, "train/loss was nan"), (INF, "train/loss was"), (1e30, "inf")]
)
def test_whatever_is_not_finite_is_found_before_it_is_saved_validated_or_recorded(
    value, reason, tmp_path
):
    skip, events, saved, rows = fit(tmp_path, at(5, value), validate=4)
    assert (skip.step, skip.position, skip.size) == (5, 32, 8)
    assert reason in skip.reason
    assert skip.images == tuple(f"image {p}" for p in range(32, 40))
    assert events == [("validated", 4)]
    assert saved[-1] == 4
    assert all(float(row["step"]) <= 4 for row in rows)


def test_a_step_of_its_last_save_is_looked_at(tmp_path):
    skip, _, saved, _ = fit(tmp_path, at(9, NAN), every=100, validate=100)
    assert skip.step == 9
    assert saved == [3, 6]


def test_a_validation_looks_first(tmp_path):
    skip, events, saved, _ = fit(
        tmp_path, at(3, NAN), Checkpoint(every_n_train_steps=None), every=100, validate=4, steps=12
    )
    assert (skip.step, events, saved) == (3, [], [])


def test_a_signal_saves_no_bad_step(tmp_path):
    """Though its weights are finite: a norm that overflows clips every gradient to nothing."""
    preemption = Preemption()

    def spoil(x, now):
        if now == 4:
            preemption.signal = signal.SIGTERM
            return x * 1e25
        return x

    before = {s: signal.getsignal(s) for s in preemption.handled}
    try:
        callbacks = (
            AgreeOnSignal(preemption),
            SaveOnSignal(preemption),
            Checkpoint(every_n_minutes=None, every_n_train_steps=3),
        )
        skip, _, saved, _ = fit(tmp_path, spoil, *callbacks, every=100)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert (skip.step, saved) == (4, [3])


def test_the_first_of_several_bad_steps_is_the_one(tmp_path):
    skip, *_ = fit(tmp_path, lambda x, now: x * NAN if now >= 2 else x, every=8, validate=100)
    assert skip.step == 2


def test_a_negative_number_of_skips_is_refused():
    with pytest.raises(ValueError, match="max_skips=-1"):
        NanGuard(max_skips=-1)


def test_the_file_is_json_lines(poisoned):
    tmp, _ = poisoned
    rows = [json.loads(line) for line in skips(tmp, "whole").path.read_text().splitlines()]
    assert all(row.keys() == {"step", "position", "size", "reason", "images"} for row in rows)
