"""Whether a script of a cluster starts a run again: the real command, and SLURM's squeue played."""

import os
import subprocess
import sys

import pytest

from exact_resume.again import PATIENCE, again
from exact_resume.checkpoint.store import Store


def save(run, step):
    Store(run / "checkpoints").commit(step, {"step": step})


@pytest.mark.parametrize(("code", "word"), [(0, "finished"), (2, "refused"), (130, "by hand")])
def test_no_after_an_end_that_would_come_again(tmp_path, capsys, code, word):
    assert again(tmp_path / "run", code) == 1
    assert word in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [None, 1, 75, 137])
def test_yes_until_so_many_starts_brought_no_checkpoint(tmp_path, capsys, code):
    run = tmp_path / "run"
    for step in (10, 20):
        assert [again(run, code) for _ in range(PATIENCE)] == [0] * PATIENCE
        assert again(run, code) == 1
        assert "without a new checkpoint" in capsys.readouterr().err
        assert again(run, code) == 0  # a person has started it once more
        save(run, step)
    assert again(run, code) == 0
    assert "newest checkpoint is step 20" in capsys.readouterr().out


def test_machines_count_by_themselves(tmp_path, monkeypatch):
    for host in ("h1", "h2"):
        monkeypatch.setattr("socket.gethostname", lambda host=host: host)
        assert [again(tmp_path, 1) for _ in range(PATIENCE + 1)] == [0] * PATIENCE + [1]


def test_a_job_of_slurm_counts_wherever_it_runs(tmp_path, monkeypatch):
    """And each node of it by itself: each may have a script of its own."""
    monkeypatch.setattr("exact_resume.again.cancelling_state", lambda: None)
    for job, node in (("7", "0"), ("7", "1"), ("8", "0")):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_NODEID", node)
        answers = []
        for host in range(PATIENCE + 1):
            monkeypatch.setattr("socket.gethostname", lambda host=host: f"h{host}")
            answers.append(again(tmp_path, 1))
        assert answers == [0] * PATIENCE + [1]


def test_a_damaged_count_begins_anew(tmp_path):
    again(tmp_path, 1)
    (counted,) = tmp_path.glob(".again-*")
    counted.write_text("{")
    assert again(tmp_path, 1) == 0


@pytest.mark.parametrize(("state", "answer"), [("RUNNING", 0), ("COMPLETING", 1), ("", 0)])
def test_no_in_a_job_that_slurm_ends(tmp_path, state, answer):
    squeue = tmp_path / "squeue"
    squeue.write_text(f'#!/bin/sh\necho "$*" > {tmp_path}/asked\necho {state}\n')
    squeue.chmod(0o755)
    job = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "3"}
    environment = os.environ | job | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [sys.executable, "-m", "exact_resume", "again", str(tmp_path / "run"), "--code", "75"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == answer, done.stderr
    assert "--jobs=9_3" in (tmp_path / "asked").read_text()


def test_a_wrong_command_says_how(tmp_path):
    command = [sys.executable, "-m", "exact_resume", "again", str(tmp_path), "--code", "x"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "again runs/NAME --code N" in done.stderr
