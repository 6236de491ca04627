"""Jobs of a real SLURM lose their node, their time and their place, and end with the same bits.

The scripts are those of docs/guides/slurm-and-clusters.md.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hosts import Cluster
from hosts import why_impossible as why_no_hosts
from jobs import Job, single_node_script, sweep_command, two_node_script, undisturbed
from record import record
from slurm import Slurm, replace, why_impossible

from runs import ROOT, differences

pytestmark = pytest.mark.cluster


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Slurm]:
    if reason := why_impossible() or why_no_hosts(tmp_path):
        pytest.skip(reason)
    with Cluster(tmp_path, ["head", "h1", "h2", "h3"]) as cluster:
        yield Slurm(cluster, tmp_path / "slurm")


def compare(job: Job, tmp: Path, name: str = "one") -> None:
    """Compare the job's run with one that nobody disturbed, and record the strikes."""
    odd = differences(tmp, name, job.name)
    record(job.strikes, equal=not odd)
    assert odd == []
    assert all(strike.lost == 0 for strike in job.strikes)


def test_every_way_in_which_a_job_ends(slurm: Slurm, tmp_path: Path) -> None:
    job = Job(slurm, tmp_path)
    words = ["trainer.max_steps=500"]
    script = single_node_script(*words)
    job.submit(script)
    job.train_on(30)
    job.strike("time limit", job.reach_time_limit)
    job.train_on(30)
    job.strike("queued again by the administrator", job.requeue)
    job.train_on(30)
    job.strike("preempted by a job of higher priority", job.preempt)
    job.train_on(30)
    node = job.node()
    job.strike("the node loses power", node.power_off)
    assert job.node() is not node
    slurm.boot(node)
    job.train_on(30)
    assert job.restarts() == 4
    job.strike("cancelled, and submitted again", lambda: job.cancel_and_submit(script))
    job.finished(restarts=0)
    undisturbed(tmp_path, "one", *words)
    compare(job, tmp_path)


def test_two_nodes(slurm: Slurm, tmp_path: Path) -> None:
    job = Job(slurm, tmp_path)
    words = ["trainer.max_steps=500"]
    script = two_node_script(*words)
    job.submit(script)
    for rank in (1, 0):
        job.train_on(30)
        host = slurm.hosts_of(job.number)[rank]
        job.strike("two nodes: a process is killed", lambda host=host: job.kill_process(host))
    job.train_on(30)
    job.strike("two nodes: time limit", job.reach_time_limit)
    job.train_on(30)
    node = slurm.hosts_of(job.number)[1]
    job.strike("two nodes: one loses power", node.power_off)
    assert node not in slurm.hosts_of(job.number)
    slurm.boot(node)
    job.train_on(30)
    assert job.restarts() == 4
    again = lambda: job.cancel_and_submit(script)  # noqa: E731
    job.strike("two nodes: cancelled, and submitted again", again)
    job.finished(restarts=0)
    undisturbed(tmp_path, "one", *words)
    compare(job, tmp_path)


def test_every_job_of_a_sweep_is_queued_again(slurm: Slurm, tmp_path: Path) -> None:
    words = ["trainer.max_steps=400"]
    log = tmp_path / "sweep.out"
    sweep = slurm.head.start(sweep_command(*words), log, tmp_path, **slurm.environment)
    jobs = [Job(slurm, tmp_path, f"cars/seed-{seed}") for seed in (0, 1)]
    jobs[0].until(lambda: "cars/seed-1" in log.read_text() or jobs[1].last_step() > 0, "submitted")
    array = slurm.run("squeue", "--noheader", "--format=%F").split()[0]
    for element, job in enumerate(jobs):
        job.number = f"{array}_{element}"
        job.train_on(30)
    for job in jobs:  # the last one's id is that of the whole array
        job.strike("a job of a sweep: time limit", job.reach_time_limit)
    jobs[0].until(lambda: sweep.poll() is not None, "the sweep ends")
    said = log.read_text()
    assert sweep.returncode == 0, said
    assert said.count(" finished") == 2, said
    for seed, job in enumerate(jobs):
        undisturbed(tmp_path, f"one-{seed}", *words, f"seed={seed}")
        compare(job, tmp_path, f"one-{seed}")


def test_a_job_that_begins_at_a_path_begins_there_once(slurm: Slurm, tmp_path: Path) -> None:
    words = ["trainer.max_steps=300"]
    undisturbed(tmp_path, "one", *words, "callbacks.checkpoint.keep_last=20")
    shutil.copytree(tmp_path / "runs" / "one", tmp_path / "runs" / "cars")
    job = Job(slurm, tmp_path)
    path = "ckpt_path=runs/cars/checkpoints/step-00000060"
    job.number = slurm.submit(single_node_script(*words, path), tmp_path)
    job.until(lambda: job.last_step() < 300, "the record is cut at step 60")
    job.train_on(30)
    job.strike("begun at a path: queued again by the administrator", job.requeue)
    first, second = list(job.starts().values())[-2:]
    assert first.step == 60
    assert second.step > 60
    job.finished(restarts=1)
    compare(job, tmp_path)


def test_a_job_that_is_too_short_says_so_and_ends(slurm: Slurm, tmp_path: Path) -> None:
    """SLURM signals it during its start, again and again."""
    script = replace(single_node_script(), {"--time=24:00:00": "--time=2"})
    job = Job(slurm, tmp_path)
    job.number = slurm.submit(script, tmp_path)
    slurm.until(job.number, "FAILED", 900)
    assert "5 starts in a row ended without a new checkpoint" in job.output()
    assert job.restarts() == 5


def test_controls(slurm: Slurm, tmp_path: Path) -> None:
    """Noise that depends on the start is seen; a script without its last line is not helped."""
    words = ["trainer.max_steps=200"]
    job = Job(slurm, tmp_path)
    script = single_node_script(*words)
    job.submit(
        replace(script, {f"{ROOT}/train.py": f"{ROOT}/tests/sabotage.py noise {ROOT}/train.py"})
    )
    job.train_on(30)
    job.strike("control", job.requeue)
    job.finished(restarts=1)
    undisturbed(tmp_path, "one", *words)
    assert differences(tmp_path, "one", "cars") != []
    lines = [line for line in script.splitlines(keepends=True) if "scontrol" not in line]
    other = Job(slurm, tmp_path, "other")
    other.submit(replace("".join(lines), {"experiment=cars": "experiment=cars name=other"}))
    other.train_on(30)
    other.come_near_time_limit()
    assert slurm.until(other.number, "FAILED")["ExitCode"] == "75:0"
