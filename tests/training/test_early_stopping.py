"""When a run that gets no better is stopped: by its record alone."""

from pathlib import Path

import pytest

from runs import losses
from sturdy.training.callbacks.early_stopping import EarlyStopping
from worlds import World, finish

NAN = float("nan")
WORSE = (
    "optimizer.lr=3.0",
    "trainer.val_check_interval=1",
    "trainer.max_steps=40",
    "callbacks.early_stopping.patience=2",
    "callbacks.checkpoint.every_n_train_steps=1",
)


@pytest.mark.parametrize(
    ("scores", "mode", "stale"),
    [
        ({}, "min", 0),
        ({2: 1.0}, "min", 0),
        ({2: 1.0, 4: 0.5, 6: 0.7, 8: 0.6}, "min", 2),
        ({2: 1.0, 4: 0.5, 6: 0.7, 8: 0.6}, "max", 3),
        ({2: 1.0, 4: 1.0}, "min", 1),
        ({2: 1.0, 4: NAN, 6: NAN}, "min", 2),
    ],
)
def test_the_time_since_the_best(scores, mode, stale):
    assert EarlyStopping(patience=1, mode=mode).stale(scores) == stale


def test_a_run_that_gets_worse_stops_and_stays_so(tmp_path: Path) -> None:
    """Killed on the way, it stops at the step of the undisturbed one, on two processes, too; and
    then stays there.
    """
    output = finish(tmp_path, "whole", 1, *WORSE).output()
    last = losses(tmp_path, "whole")[-1]
    scores = {int(row[0]): float(row[3]) for row in losses(tmp_path, "whole") if row[3]}
    assert len(scores) < 40
    assert EarlyStopping(patience=2).stale(scores) == 2
    assert "val/loss was no better 2 times; stopping" in output
    World(tmp_path, "killed", 2, *WORSE).until(2).kill().wait()
    finish(tmp_path, "killed", 2, *WORSE)
    assert losses(tmp_path, "killed")[-1] == last
    again = finish(tmp_path, "killed", 1, *WORSE).output()
    assert f"finished at step {max(scores)}" in again
    assert losses(tmp_path, "killed")[-1] == last
