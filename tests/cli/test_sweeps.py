"""Sweeps: what the runs are called, that mistakes are answered first, how jobs end and are taken
up; real processes.
"""

import os
import signal
import subprocess
import sys

import pytest

import mini
import striking
from runs import ROOT, command, differences, train
from sturdy.cli.overrides import compose_checked
from sturdy.cli.sweep import collect_summaries, report
from sturdy.cli.sweep_plan import Job, make_label, plan_jobs
from sturdy.cli.usage import UsageError

TRAIN = ROOT / "conf" / "train.yaml"


def names(*words):
    return [job.name for job in plan_jobs(TRAIN, list(words))]


def test_a_run_is_named_after_what_is_swept_and_nothing_else():
    found = names("experiment=cars", "optimizer.lr=1e-3,3e-3", "seed=0,1", "clip=2")
    assert found == [
        f"cars/optimizer.lr-{lr}+seed-{seed}" for lr in ("0.001", "0.003") for seed in (0, 1)
    ]
    assert sorted(found) == sorted(
        names("seed=0,1", "clip=3", "optimizer.lr=0.001,0.003", "experiment=cars")
    )
    assert set(found) < set(names("experiment=cars", "optimizer.lr=1e-3,3e-3", "seed=range(0,3)"))
    assert names("experiment=cars", "seed=3") == names("experiment=cars", "name=cars") == ["cars"]
    assert names("name=a,b", "seed=choice(0)") == ["a/seed-0", "b/seed-0"]
    assert names("sampler=glob(h*)", "seed=0,0") == ["default/sampler-heun+seed-0"]


def test_a_jobs_words_are_the_command_of_a_single_run():
    words = [
        "data=folder",
        "data.root='/a b/c',/d",
        "backbone.multipliers=[1,2],[1,2,4]",
        "hydra/launcher=basic",
    ]
    for job in plan_jobs(TRAIN, words):
        cfg = compose_checked(TRAIN, job.words)
        assert cfg.name == job.name
        assert cfg.data.root in ("/a b/c", "/d")
        assert not any(word.startswith("hydra") for word in job.words)
        assert (
            compose_checked(TRAIN, [f"name={job.name}"]).name == job.name
        )  # as a person would type it


def test_any_value_makes_a_directory_of_its_own():
    values = [
        "/x/y",
        "/x-y",
        "x y",
        "..",
        "a=b",
        "a+b",
        "a,b",
        "$x",
        "ü",
        "x" * 300,
        "x" * 301,
        "-1",
        "",
        "null",
    ]
    labels = [make_label({"data.root": value}) for value in values]
    assert len({text.lower() for text in labels}) == len(values)
    for text in labels:
        assert len(text) < 200
        assert set(text) <= set("abcdefghijklmnopqrstuvwxyz0123456789.-+_")
        assert text.startswith("data.root-")
    assert make_label({"a": "1", "+b": "2"}) == make_label({"b": "2", "a": "1"}) == "a-1+b-2"


MISTAKES = {
    "data.batchsize=8,16": "there is no key 'data.batchsize'. Did you mean data.batch_size",
    "experiment=cars,carz": "there is no such experiment. Did you mean cars?",
    "sampler=heun,heum": "sampler-heum: sampler=heum: there is no such sampler. Did you mean heun?",
    "data.batch_size=8,many": "data.batch_size is a whole number like 64, not a word",
    "data=cars,folder": "data-folder: data.root must be given: data.root=...",
    "trainer.max_epochs=3,4": (
        "trainer.max_epochs is refused: training counts steps: use trainer.max_steps"
    ),
    "+backbone.widht=3,4": "takes no 'widht'. Did you mean width?",
    "seed=interval(0,1)": "a sweep goes through values; give them, as in seed=1,2,3",
    "sampler=glob(q*)": "no values to sweep through",
    "hydra/sweeper=basic": "hydra/sweeper is refused: a sweep goes through every combination",
    "hydra/launcher=slrum": "there is no such hydra/launcher. Did you mean slurm",
    "seed=0,1 lr=": "there is no key 'lr'",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes_are_answered_before_anything_starts(words):
    with pytest.raises(UsageError) as mistake:
        plan_jobs(TRAIN, words.split())
    assert MISTAKES[words] in str(mistake.value)


def test_without_submitit_the_launcher_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UsageError, match=r"pip install 'sturdy-diffusion\[slurm\]'"):
        plan_jobs(TRAIN, ["hydra/launcher=slurm", "seed=0,1"])


ALONE = {
    "seed=0,1": "add -m",
    "sampler=heun,euler": "add -m",
    "hydra/launcher=slurm": "add -m",
    "hydra.mode=MULTIRUN": "asked for with -m",
}


@pytest.mark.parametrize("word", ALONE)
def test_what_is_for_a_sweep_is_none_of_a_single_run(word):
    with pytest.raises(UsageError, match=ALONE[word]):
        compose_checked(TRAIN, [word])


def run(tmp, *words):
    """A sweep of the little script to its end: exit code, what it said, and how many starts each
    run has seen.
    """
    words = mini.command(tmp / "train.py", *words)
    done = subprocess.run(
        words, cwd=tmp, env=mini.environment(), capture_output=True, text=True, timeout=120
    )
    homes = {path.parent.name: mini.starts(path.parent) for path in (tmp / "runs").rglob("starts")}
    return done.returncode, done.stdout + done.stderr, homes


@pytest.fixture
def tmp(tmp_path):
    """A directory with the little script."""
    mini.project(tmp_path)
    return tmp_path


def test_jobs_that_fail_do_not_stop_the_others_and_the_worst_is_the_exit_code(tmp):
    code, said, homes = run(tmp, "end=1,0,2,33")
    assert code == 2
    assert homes == {"end-0": 1, "end-1": 1, "end-2": 1, "end-33": 1}
    table = [line.split(maxsplit=1) for line in said.splitlines() if line.startswith("    mini/")]
    assert dict(table) == {
        "mini/end-0": "finished",
        "mini/end-1": "failed",
        "mini/end-2": "refused",
        "mini/end-33": "failed",
    }
    assert "ended with exit code 33" in said
    assert "exit code 2: the worst is refused" in said
    assert {path.name for path in tmp.iterdir()} == {"conf", "train.py", "runs"}


def test_the_worst_of_the_exit_codes_is_what_a_person_must_see_first():
    assert report({"a": 0, "b": 0}) == 0
    assert report({"a": 0, "b": 75, "c": None}) == 75
    assert report({"a": 0, "b": None}) == 75  # nothing was lost, and something is left to do
    assert report({"a": 75, "b": 1, "c": 0}) == 1
    assert report({"a": 1, "b": 2, "c": 75}) == 2
    assert report({"a": 2, "b": 130, "c": 1}) == 130


def test_the_table_says_how_good_each_became(tmp_path, capsys):
    jobs = [Job(name, [], tmp_path / f"{name}.csv") for name in ("a", "b", "c")]
    for job, rows in zip(
        jobs, ("2,0.5,0.9\n4,0.4,0.7\n6,0.4,0.8\n", "2,0.5,0.5\n3,0.4,\n"), strict=False
    ):
        job.metrics.write_text("step,train/loss,val/loss\n" + rows)
    assert report({"a": 0, "b": 75, "c": None}, jobs) == 75
    said = capsys.readouterr().out
    assert "a  finished            best val/loss 0.7000 at step 4" in said
    assert "b  stopped, and saved  best val/loss 0.5000 at step 2" in said
    assert "c  not started\n" in said
    assert "best val/loss of 2: mean 0.6000, standard deviation 0.1414" in said


def test_a_sweep_of_evaluate_prints_one_table_of_what_its_jobs_measured(tmp):
    """The little script stands for evaluate.py, whose config has the key and which has no name."""
    config = tmp / "conf" / "train.yaml"
    config.write_text(
        config.read_text().replace("name: mini", "run: mini\nevaluate: {summary: null}\nsteps: 1")
    )
    code, said, _ = run(tmp, "run=cars", "steps=8,15", "end=0,1")
    assert code == 1
    assert (
        """
steps  end  fid   note
8      0    0.75  cars
8      1    -     cars
15     0    0.4   cars
15     1    -     cars
"""
        in said
    )
    assert {path.name for path in (tmp / "runs").iterdir()} == {"cars"}, "summaries are deleted"


def test_a_job_that_wrote_no_summary_has_no_row(tmp_path):
    jobs = [Job(f"n-{n}", [], swept={"n": n}, summary=tmp_path / "s" / f"{n}.json") for n in "123"]
    jobs[0].summary.parent.mkdir()
    jobs[1].summary.write_text('{"fid": 1.5}')
    assert collect_summaries(jobs) == [["n", "fid"], ["2", "1.5"]]
    assert collect_summaries(jobs) == []


def test_a_mistake_starts_nothing(tmp):
    code, said, homes = run(tmp, "end=0,1", "sede=1,2")
    assert (code, homes) == (2, {})
    assert "there is no key 'sede'. Did you mean seed?" in said
    assert "Traceback" not in said


def begin(tmp, *words):
    """A sweep that runs, in a process group of its own as a terminal would make."""
    words = mini.command(tmp / "train.py", *words)
    pipe = subprocess.PIPE
    return subprocess.Popen(
        words, cwd=tmp, env=mini.environment(), stdout=pipe, text=True, start_new_session=True
    )


def test_a_signal_stops_the_sweep_and_the_same_command_takes_it_up(tmp):
    words = ["wait=heard", "seed=0,1"]
    first, second = tmp / "runs" / "mini" / "seed-0", tmp / "runs" / "mini" / "seed-1"
    sweep = begin(tmp, *words)
    mini.pids(first)
    os.killpg(sweep.pid, signal.SIGINT)  # as Ctrl-C in a terminal
    said = sweep.communicate(timeout=60)[0]
    assert sweep.returncode == 75
    assert (first / "saved").read_text() == "SIGINT"
    assert not second.exists()
    assert "mini/seed-0  stopped, and saved" in said
    assert "mini/seed-1  not started" in said

    sweep = begin(tmp, *words)
    mini.pids(second)
    sweep.send_signal(signal.SIGTERM)  # to the sweep alone
    assert "mini/seed-0  finished" in sweep.communicate(timeout=60)[0]
    assert sweep.returncode == 75
    assert (second / "saved").read_text() == "SIGTERM"
    assert run(tmp, *words)[0] == 0
    assert (mini.starts(first), mini.starts(second)) == (3, 2)


def test_ctrl_c_a_second_time_stops_at_once(tmp):
    sweep = begin(tmp, "wait=slow", "seed=0,1")
    os.kill(mini.pids(tmp / "runs" / "mini" / "seed-0")[1], signal.SIGINT)
    mini.there(tmp / "runs" / "mini" / "seed-0" / "saved")
    os.killpg(sweep.pid, signal.SIGINT)
    assert "mini/seed-0  stopped at once" in sweep.communicate(timeout=60)[0]
    assert sweep.returncode == 130


def test_a_job_that_does_not_listen_yet_is_taken_up_too(tmp):
    sweep = begin(tmp, "wait=deaf", "seed=0,1")
    mini.pids(tmp / "runs" / "mini" / "seed-0")
    sweep.send_signal(signal.SIGTERM)
    sweep.communicate(timeout=60)
    assert sweep.returncode == 75


def test_a_job_killed_by_others_fails_and_the_next_one_runs(tmp):
    sweep = begin(tmp, "wait=deaf,null")
    os.kill(mini.pids(tmp / "runs" / "mini" / "wait-deaf")[0], signal.SIGKILL)
    said = sweep.communicate(timeout=60)[0]
    assert sweep.returncode == 1
    assert "mini/wait-null  finished" in said


def test_a_job_saves_and_leaves_when_its_sweep_is_killed(tmp):
    sweep = begin(tmp, "wait=heard", "seed=0,1")
    mini.pids(tmp / "runs" / "mini" / "seed-0")
    sweep.kill()
    sweep.communicate(timeout=60)
    assert mini.there(tmp / "runs" / "mini" / "seed-0" / "saved")
    assert run(tmp, "wait=null", "seed=0,1")[0] == 0


@pytest.mark.slow
def test_real_runs_in_a_sweep_end_in_the_bits_of_runs_alone(tmp_path):
    """One process runs through; two are stopped after two steps, and taken up by the same
    command.
    """
    words = [
        "data.shards=2",
        "reduction=tree",
        *striking.words("SIGUSR1", step=2, key="trainer.devices", value=2),
    ]
    words = [*command(tmp_path, "swept", "trainer.devices=1,2", *words), "-m"]
    env = mini.environment()
    first = subprocess.run(
        words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200
    )
    assert first.returncode == 75, first.stdout + first.stderr
    assert "finished at step 12" in first.stdout
    assert "SIGUSR1: saved step 3. Run the same command to continue." in first.stdout
    again = subprocess.run(
        words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert (
        "swept/trainer.devices-1: finished at step 12 (trainer.max_steps=12), nothing to"
        in again.stdout
    )
    assert (
        "swept/trainer.devices-2: 60 images, 8 classes, 2 processes; resumed from step 3"
        in again.stdout
    )
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "cache"}
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"swept"}
    assert {path.name for path in (tmp_path / "runs" / "swept").iterdir()} == {
        "trainer.devices-1",
        "trainer.devices-2",
    }
    train(tmp_path, "alone", "data.shards=2")
    for devices in (1, 2):
        assert differences(tmp_path, "alone", f"swept/trainer.devices-{devices}") == []
