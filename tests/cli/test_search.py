"""A sweep whose values Optuna chooses: what it finds, and that a killed search ends in the same
runs; real processes.
"""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from statistics import mean

import pytest

import mini
from runs import ROOT, command, differences
from sturdy.cli.overrides import compose_checked
from sturdy.cli.search import choose_values, plan_search
from sturdy.cli.usage import UsageError

TRAIN = ROOT / "conf" / "train.yaml"
LR = "optimizer.lr=tag(log,interval(1e-4,1e-2))"


@pytest.fixture
def tmp(tmp_path):
    """A directory with the little script, whose score is least at x = 0.3."""
    mini.project(tmp_path)
    config = tmp_path / "conf" / "train.yaml"
    config.write_text(config.read_text() + "x: 0.0\n")
    return tmp_path


def start(tmp, *words):
    return subprocess.Popen(
        mini.command(tmp / "train.py", *words),
        cwd=tmp,
        env=mini.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(tmp, *words):
    process = start(tmp, *words)
    said, _ = process.communicate(timeout=300)
    return process.returncode, said


def trials(said):
    return [line.split(": ")[1] for line in said.splitlines() if line.startswith("trial ")]


def search(*words):
    return plan_search(TRAIN, words)


def test_it_finds_the_least_and_is_a_function_of_its_seed():
    plan = search("backbone.dropout=interval(0.0,0.9)", "sweep.trials=40", "sweep.seed=3")

    def values(number, plan):
        done = []
        for _ in range(number):
            chosen = choose_values(plan, done)
            done.append((chosen, (chosen["backbone.dropout"] - 0.3) ** 2))
        return [chosen["backbone.dropout"] for chosen, _ in done]

    found = values(40, plan)
    assert values(40, plan) == found
    assert min(abs(value - 0.3) for value in found) < 0.02
    distances = [abs(value - 0.3) for value in found]
    assert mean(distances[10:]) < mean(distances[:10])  # it looks where the scores are good
    other = search("backbone.dropout=interval(0.0,0.9)", "sweep.trials=40", "sweep.seed=4")
    assert values(3, other) != found[:3]


def test_every_kind_of_values():
    plan = search(
        LR,
        "data.batch_size=8,16",
        "seed=range(2,9,3)",
        "sampler=heun,euler",
        "clip=int(interval(1,3))",
        "experiment=cars",
        "sweep.trials=1",
    )
    assert plan.fixed == ["experiment=cars"]
    seen = []
    for number in range(24):
        seen.append(choose_values(replace(plan, seed=number), []))
    assert {chosen["seed"] for chosen in seen} == {2, 5, 8}
    assert {chosen["clip"] for chosen in seen} == {1, 2, 3}
    assert {chosen["sampler"] for chosen in seen} == {"heun", "euler"}
    rates = [chosen["optimizer.lr"] for chosen in seen]
    assert all(1e-4 <= rate <= 1e-2 and len(f"{rate:.10g}") < 10 for rate in rates)
    assert sum(rate < 1e-3 for rate in rates) > 4  # half of them, by the logarithm


def test_words_keep_their_quotes(tmp_path):
    plan = search("name='a b,c','d'", "sweep.trials=1")
    (names,) = plan.space.values()
    assert [compose_checked(TRAIN, [f"name={name}"]).name for name in names.choices] == [
        "a b,c",
        "d",
    ]


MISTAKES = {
    "sweep.trials=ten seed=0,1": "sweep.trials=ten: it is a whole number",
    "sweep.trials=0 seed=0,1": "at least 1",
    "sweep.trials=3": "nothing to search through",
    "sweep.trials=3 optimizer.lrr=interval(0,1)": "Did you mean optimizer.lr",
    "sweep.trials=3 data.batch_size=8,many": "data.batch_size is a whole number",
    "sweep.trials=3 experiment=cars,carz": "Did you mean cars?",
    "sweep.trials=3 seed=range(5,1)": "the range is empty",
    "sweep.trials=3 seed=0,1 hydra/launcher=slurm": "leave it out",
    "sweep.trials=3 optimizer.lr=tag(log,interval(0,1))": "log",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes_are_answered_before_anything_starts(words):
    with pytest.raises(UsageError) as mistake:
        search(*words.split())
    assert MISTAKES[words] in str(mistake.value)


def test_without_optuna_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UsageError, match=r"pip install 'sturdy-diffusion\[optuna\]'"):
        search("seed=0,1", "sweep.trials=3")


def test_a_killed_search_ends_in_the_same_runs(tmp):
    words = ["x=interval(0.0,1.0)", "sweep.trials=3"]
    code, said = run(tmp, "name=whole", *words)
    assert code == 0, said
    whole = [name.removeprefix("whole/") for name in trials(said)]
    assert len(set(whole)) == 3
    assert "best: whole/x-" in said
    process = start(tmp, "name=killed", *words)
    mini.there(tmp / "runs" / "killed" / whole[1] / "metrics.csv", seconds=120)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    code, said = run(tmp, "name=killed", *words)
    assert [name.removeprefix("killed/") for name in trials(said)] == whole
    assert {path.name for path in (tmp / "runs" / "killed").iterdir()} == set(whole)


@pytest.mark.slow
def test_a_run_that_fails_counts_as_bad_and_one_that_is_refused_ends_the_search(tmp):
    code, said = run(tmp, "end=1,1", "x=interval(0.0,1.0)", "sweep.trials=2")
    assert code == 1
    assert len(trials(said)) == 2
    code, said = run(tmp, "end=2,2", "x=interval(0.0,1.0)", "sweep.trials=2")
    assert code == 2
    assert len(trials(said)) == 1


def test_a_run_that_is_killed_ends_the_search_and_is_chosen_again(tmp):
    words = ["wait=heard", "x=interval(0.0,1.0)", "sweep.trials=2"]
    process = start(tmp, *words)
    while not (pids := list(tmp.glob("runs/mini/*/pid"))):
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(mini.pids(pids[0].parent)[0], signal.SIGKILL)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 75, said
    assert "was killed by SIGKILL" in said
    assert len(trials(said)) == 1


@pytest.mark.slow
def test_the_runs_of_a_killed_search_have_the_bits_of_an_undisturbed_one(tmp_path):
    """Of real training: each trial's weights, and so each choice."""

    def begin(name):
        python, script, *words = command(tmp_path, name, LR)
        words = [python, script, "-m", *words, "sweep.trials=3"]
        return subprocess.Popen(
            words,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    process = begin("whole")
    said, _ = process.communicate(timeout=600)
    whole = [name.removeprefix("whole/") for name in trials(said)]
    assert len(set(whole)) == 3, said
    for name in whole:
        process = begin("killed")
        mini.there(tmp_path / "runs" / "killed" / name / "metrics.csv", lines=4, seconds=300)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    process = begin("killed")
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    assert [name.removeprefix("killed/") for name in trials(said)] == whole
    for name in whole:
        assert differences(tmp_path, f"whole/{name}", f"killed/{name}") == []
