"""The proof that users run: it proves where the promise holds, and fails where a mechanism is taken
away.
"""

import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest

from runs import ROOT, SMALL
from sturdy.prove import KillPoint, Run, Snapshot, draw_kill_points, run_with_kills

FEW = [
    "trainer.max_steps=8",
    "trainer.val_check_interval=4",
    "callbacks.samples.every_n_steps=null",
]


def words(tmp_path, *overrides):
    paths = [f"paths.runs={tmp_path / 'runs'}", f"paths.cache={tmp_path / 'cache'}", "name=it"]
    return [sys.executable, str(ROOT / "prove.py"), *SMALL, *FEW, *paths, *overrides]


def prove(tmp_path, *overrides):
    return subprocess.run(words(tmp_path, *overrides), capture_output=True, text=True, timeout=500)


def table(output):
    """(entered at, killed) of each start."""
    return re.findall(r"^ +\d+  (.{12})  (.+)$", output, re.MULTILINE)


@pytest.mark.slow
def test_proves_the_promise(tmp_path):
    done = prove(tmp_path, "kills=2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "once against twice: every value equal; every logged value equal" in done.stdout
    assert "once against killed: every value equal; every logged value equal" in done.stdout
    assert "PROVED: the killed run ended in the same bits" in done.stdout
    starts = [(entered.strip(), killed) for entered, killed in table(done.stdout)]
    assert starts[0][0] == "fresh"
    assert starts[0][1].startswith("at step ")
    assert starts[-1][0].startswith("step ")
    assert starts[-1][1] == "finished"
    assert all(len(line) <= 80 for line in done.stdout.splitlines() if str(tmp_path) not in line), (
        done.stdout
    )


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", ["order", "noise", "dropout"])
def test_control_fails_without_the_mechanism(mechanism, tmp_path):
    done = prove(tmp_path, "kills=1", f"break={mechanism}", "trainer.max_steps=24")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "once against twice: every value equal" in done.stdout
    assert "first difference at step" in done.stdout
    assert "NOT PROVED: undisturbed runs agree, and the killed one does not" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides", [[], ["data.num_workers=1", "data.shards=2"], ["learning_rate=linear"]]
)
def test_ten_kills(overrides, tmp_path):
    done = prove(tmp_path, "kills=10", "trainer.max_steps=60", *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(table(done.stdout)) >= 8


@pytest.mark.slow
def test_where_no_checkpoint_comes_before_the_end_nothing_is_claimed(tmp_path):
    never = ["callbacks.checkpoint.every_n_train_steps=null", "trainer.val_check_interval=100"]
    done = prove(tmp_path, "kills=3", *never)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "NOT PROVED: all is equal, but no start resumed from a checkpoint." in done.stdout


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["kills=many"], "usage: "),
        (["break=luck"], "usage: "),
        (["data.batchsize=3"], "Did you mean data.batch_size"),
    ],
)
def test_mistakes_start_nothing(overrides, text, tmp_path):
    done = prove(tmp_path, *overrides)
    assert done.returncode == 2
    assert text in done.stderr
    assert not (tmp_path / "runs").exists()


# The rest is about how runs are watched and killed. What is run is a script that starts at once and
# counts its steps.

COUNTING = """
import os, sys, time
home, steps, every = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
time.sleep(0.1)
store, record = home + "/checkpoints", home + "/metrics.csv"
os.makedirs(store, exist_ok=True)
entry = max((int(name[5:]) for name in os.listdir(store)), default=0)
print(f"resumed from step {entry}" if entry else "fresh, to step", flush=True)
if steps < 0:
    sys.exit("it cannot be done")
with open(record + ".tmp", "w") as file:
    file.write("step,train/loss\\n" + "".join(f"{i},0.5\\n" for i in range(1, entry + 1)))
os.replace(record + ".tmp", record)
for step in range(entry + 1, steps + 1):
    time.sleep(0.02)
    with open(record, "a") as file:
        file.write(f"{step},0.5\\n")
    if step % every == 0:
        os.mkdir(f"{store}/step-{step:08d}")
"""


def counting(tmp_path, name, steps=20, every=5):
    home = tmp_path / name
    return Run(home, [sys.executable, "-c", COUNTING, str(home), str(steps), str(every)], steps)


def test_a_life_is_seen_from_start_up_to_its_end(tmp_path):
    run = counting(tmp_path, "run")
    timeline = run.run_until()
    assert run.finished
    assert (timeline[0].step, timeline[-1].step) == (-1, 20)
    steps = [seen.step for seen in timeline]
    assert steps == sorted(steps)
    assert len(set(steps)) > 10
    assert [seen.seconds for seen in timeline] == sorted(seen.seconds for seen in timeline)
    assert min(seen.step for seen in timeline if seen.saved) in (5, 6)
    assert len(run.rows()) == 20


def test_it_is_killed_where_it_is_told_and_seen_anew(tmp_path):
    run = counting(tmp_path, "run")
    end = run.run_until(KillPoint(7, True, 0.0))[-1]
    assert not run.finished
    assert 7 <= end.step < 20
    end = run.run_until(KillPoint(-1, False, 0.0))[-1]
    assert end.step == -1, "the record is that of the start before"
    end = run.run_until(KillPoint(2, False, 0.0))[-1]
    assert 5 <= end.step < 20, "it was entered behind this step, and is killed as soon as it trains"
    assert "resumed from step 5" in run.output()


@pytest.mark.parametrize("every", [3, 1000])
def test_a_campaign_ends_also_where_each_kill_loses_everything(every, tmp_path, capsys):
    timeline = counting(tmp_path, "whole", every=every).run_until()
    run = counting(tmp_path, "killed", every=every)
    assert run_with_kills(run, draw_kill_points(timeline, 7, random.Random(1))) == (every == 3)
    assert run.finished
    assert len(run.rows()) == 20
    starts = table(capsys.readouterr().out)
    assert starts[-1][1] == "finished"
    assert [killed for _, killed in starts[1:3]] == ["in start-up"] * 2, "twice in a row"
    assert {entered.strip() for entered, _ in starts} <= {
        "fresh",
        "-",
        *(f"step {3 * k}" for k in range(1, 7)),
    }


def test_a_kill_that_would_come_after_the_end_is_told(tmp_path, capsys):
    run = counting(tmp_path, "run", steps=3)
    assert not run_with_kills(run, [KillPoint(2, False, 60.0), KillPoint(-1, False, 0.0)])
    assert "it finished before kill 1" in capsys.readouterr().out


def test_a_run_that_fails_by_itself_is_told_with_its_output(tmp_path, capsys):
    run = counting(tmp_path, "run", steps=-1)
    with pytest.raises(SystemExit) as exit:
        run.run_until()
    assert exit.value.code == 1
    error = capsys.readouterr().err
    assert "it cannot be done" in error
    assert "run: train.py ended with exit code 1; nothing is proved" in error


@pytest.mark.parametrize("kills", [0, 1, 2, 3, 10])
def test_instants_are_of_the_whole_life_and_the_last_has_something_to_resume(kills):
    timeline = [
        Snapshot(0.0, -1, False),
        *(Snapshot(10.0 + k, k, k >= 4) for k in range(11)),
        Snapshot(30.0, 10, True),
    ]
    drawn = [draw_kill_points(timeline, kills, random.Random(seed)) for seed in range(50)]
    assert all(len(one) == kills for one in drawn)
    at_start = [i for i in range(kills) if i % 5 in (1, 2)]
    for one in drawn:
        assert [i for i, instant in enumerate(one) if instant.step < 0] == at_start
        assert all(0 <= instant.seconds < 10 for instant in one)
        steps = [instant.step for instant in one if instant.step >= 0]
        assert steps == sorted(steps)
        assert not kills or any(instant.saved and instant.step < 10 for instant in one)
    if kills:
        assert len({instant.step for one in drawn for instant in one}) > 5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_takes_its_child_along(number, tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from pathlib import Path
import sturdy.prove as prove
from test_prove import counting
prove.compose_or_fail = lambda *_: type("cfg", (), dict(name="it"))
prove.make_runs = lambda *_: [counting(Path({str(tmp_path)!r}), "run", steps=10**6)] * 3
prove.prove(Path(), [])
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        metrics = tmp_path / "run" / "metrics.csv"
        while not metrics.exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(number)
        error = process.communicate(timeout=60)[1]
    assert (process.returncode, error) == (130, b"interrupted; nothing is proved\n")
    size = metrics.stat().st_size
    time.sleep(0.2)
    assert metrics.stat().st_size == size, "its child goes on"
    assert os.path.exists(metrics)
