"""Runs under SLURM, as far as that goes without a cluster: real submitit, real scripts, and SLURM's
programs played.

What plays them writes down how it was called, runs a batch script with SLURM's variables, and
starts it again when it is asked to. It knows no time limit, no nodes and no accounting: who signals
    here is the test.
"""

import os
import re
import signal
import subprocess
import sys
from importlib.util import find_spec

import pytest

import mini
import striking
from runs import command, differences, train

submitit = pytest.mark.skipif(not find_spec("submitit"), reason="needs pip install '.[slurm]'")

# To copy, in docs/guides/slurm-and-clusters.md.
BATCH = """\
#!/bin/bash
#SBATCH --job-name=cars
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.txt
srun --ntasks=1 --cpus-per-task=$SLURM_CPUS_PER_TASK \\
    python train.py experiment=cars trainer=multi_gpu restarts=10
code=$?
python -m exact_resume again runs/cars --code $code && scontrol requeue $SLURM_JOB_ID
exit $code
"""

COMMON = """\
#!/bin/bash
here={here}
echo "$(basename $0) $*" >> $here/calls
"""

PROGRAMS = {
    # An element of an array is a job by itself; the last one has the array's own id.
    # What reads sbatch's answer must not wait for the job.
    "sbatch": """
script=${@: -1}
n=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' $script)
cp $script $here/7.sh
export SLURM_NTASKS=1 SLURM_STEP_NUM_TASKS=1 SLURM_NTASKS_PER_NODE=1
export SLURM_JOB_NUM_NODES=1 SLURM_NNODES=1
export SLURM_JOB_NAME=test
export SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0
export SLURM_JOB_NODELIST=localhost SLURM_NODELIST=localhost
export SLURM_JOB_ID=7
if [ -z "$n" ]; then
    setsid $here/batch 7 < /dev/null > $here/output 2>&1 &
fi
for i in $(seq 0 ${n:--1}); do
    export SLURM_ARRAY_JOB_ID=7 SLURM_ARRAY_TASK_ID=$i SLURM_JOB_ID=$((8 + i))
    if [ $i = $n ]; then export SLURM_JOB_ID=7; fi
    setsid $here/batch 7_$i < /dev/null > $here/output 2>&1 &
done
echo "Submitted batch job 7"
""",
    "batch": """
echo $$ > $here/pid.$1
bash $here/7.sh
echo $? > $here/new.$1
mv $here/new.$1 $here/exit.$1
""",
    "srun": """
while [[ $1 == --* ]]; do
    case $1 in
        --output) output=$2; shift 2 ;;
        --error) shift 2 ;;
        *) shift ;;
    esac
done
output=${output//%A_%a/$SLURM_ARRAY_JOB_ID"_"$SLURM_ARRAY_TASK_ID}
output=${output//%j/$SLURM_JOB_ID}
output=${output//%t/0}
mkdir -p $(dirname ${output:-$here/x})
exec "$@" >> ${output:-$here/output} 2>&1
""",
    # The job ends, and begins anew.
    "scontrol": """
setsid bash -c 'while kill -0 $(cat $0/pid.$1) 2> /dev/null; do sleep 0.05; done
    rm $0/exit.$1
    exec $0/batch $1' \\
    $here $2 < /dev/null > /dev/null 2>&1 &
""",
    # Asked for an array, it tells of each of its elements.
    "squeue": """
elements=$(ls $here | grep -c '^pid.7_')
case $* in
    *--jobs=7) for i in $(seq ${elements/#0/1}); do cat $here/state; done ;;
    *) cat $here/state ;;
esac
""",
    "sacct": "echo 'JobID|State|NodeList'; echo '7|RUNNING|localhost'\n",
}


@pytest.fixture
def cluster(tmp_path):
    """A directory with SLURM's programs, the little script, and jobs that SLURM counts as
    running.
    """
    here = tmp_path / "cluster"
    here.mkdir()
    for name, text in PROGRAMS.items():
        (here / name).write_text(COMMON.format(here=here) + text)
        (here / name).chmod(0o755)
    (here / "python").write_text(f'#!/bin/bash\nexec {sys.executable} "$@"\n')
    (here / "python").chmod(0o755)
    (here / "state").write_text("RUNNING\n")
    mini.project(tmp_path)
    return here


def calls(cluster, name):
    """How one of the programs was called, each time."""
    lines = (cluster / "calls").read_text().splitlines()
    return [line.removeprefix(f"{name} ") for line in lines if line.startswith(f"{name} ")]


def sweep(cluster, *words):
    """A sweep that runs, on its way through the launcher."""
    words = mini.command(cluster.parent / "train.py", *words)
    env, pipe = mini.environment(cluster), subprocess.PIPE
    return subprocess.Popen(
        words, cwd=cluster.parent, env=env, stdout=pipe, stderr=subprocess.STDOUT, text=True
    )


def tell_all(home, number):
    """Send a signal as SLURM does: to each process of the step, the one that waits for the run
    included.
    """
    run, parent = mini.pids(home)
    (home / "pid").unlink()
    os.kill(run, number)
    os.kill(parent, number)


@pytest.mark.slow
@submitit
def test_what_was_stopped_is_queued_again_once_and_what_ended_is_not(cluster):
    """Four jobs: two hear the warning and then go on to end well, or badly; two end so at once."""
    runs = cluster.parent / "runs" / "mini"
    process = sweep(
        cluster,
        "hydra/launcher=slurm",
        "hydra.launcher.partition=long",
        "wait=heard,null",
        "end=0,2",
    )
    tell_all(runs / "end-0+wait-heard", signal.SIGUSR1)
    tell_all(runs / "end-2+wait-heard", signal.SIGTERM)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 2, said
    for name, outcome in (("end-0", "finished"), ("end-2", "refused")):
        assert re.search(rf"mini/{name}\+wait-heard +{outcome}", said)
        assert re.search(rf"mini/{name}\+wait-null +{outcome}", said)
        assert (
            mini.starts(runs / f"{name}+wait-heard"),
            mini.starts(runs / f"{name}+wait-null"),
        ) == (2, 1)
    assert sorted(calls(cluster, "scontrol")) == ["requeue 7_0", "requeue 7_1"]
    script = (cluster / "7.sh").read_text()
    for option in (
        "signal=USR1@300",
        "gpus-per-node=1",
        "time=1440",
        "job-name=mini",
        "partition=long",
        "array=0-3%4",
    ):
        assert f"#SBATCH --{option}\n" in script
    assert {path.name for path in cluster.parent.iterdir()} == {
        "cluster",
        "conf",
        "train.py",
        "runs",
    }
    assert {path.name for path in (cluster.parent / "runs").iterdir()} == {"mini", ".submitit"}


@submitit
def test_the_last_job_of_a_sweep_is_queued_again_too(cluster):
    runs = cluster.parent / "runs" / "mini"
    process = sweep(cluster, "hydra/launcher=slurm", "wait=heard", "seed=0,1")
    for seed in (0, 1):
        tell_all(runs / f"seed-{seed}", signal.SIGUSR1)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said
    assert sorted(calls(cluster, "scontrol")) == ["requeue 7_0", "requeue 7_1"]


@submitit
def test_what_was_cancelled_saves_and_is_not_queued_again(cluster):
    (cluster / "state").write_text("COMPLETING\n")
    process = sweep(cluster, "hydra/launcher=slurm", "wait=heard")
    tell_all(cluster.parent / "runs" / "mini", signal.SIGTERM)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 75, said
    assert "mini  stopped, and saved" in said
    assert calls(cluster, "scontrol") == []


@submitit
def test_submitit_without_a_cluster(cluster):
    """Its local executor: one job is told to save and goes on, the other fails."""
    place = (
        f"hydra.searchpath=['file://{cluster}']"  # of options of one's own: the jobs need it, too
    )
    process = sweep(cluster, "hydra/launcher=slurm_local", place, "wait=heard", "end=0,1")
    for name in ("end-0", "end-1"):
        tell_all(cluster.parent / "runs" / "mini" / name, signal.SIGUSR1)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 1, said
    assert "mini/end-0  finished" in said
    assert "mini/end-1  failed" in said
    assert mini.starts(cluster.parent / "runs" / "mini" / "end-0") == 2
    assert (cluster.parent / "runs" / "mini" / "end-0" / "starts").read_text().count(
        f"{place} "
    ) == 2
    assert not (cluster / "calls").exists()


@submitit
def test_mistakes_are_told_before_anything_is_submitted(cluster):
    for words, text in {
        ("hydra.launcher.tiemout_min=3",): "tiemout_min",
        ("sede=0,1",): "Did you mean seed?",
    }.items():
        process = sweep(cluster, "hydra/launcher=slurm", *words)
        said = process.communicate(timeout=60)[0]
        assert process.returncode == 2
        assert text in said
        assert "Traceback" not in said
    assert not (cluster / "calls").exists()


@submitit
def test_a_machine_without_slurm_says_so(cluster, monkeypatch):
    (cluster / "srun").unlink()
    monkeypatch.setenv("PATH", str(cluster))  # this machine may have a real one
    process = sweep(cluster, "hydra/launcher=slurm", "seed=0,1")
    assert "are you indeed on a slurm cluster?" in process.communicate(timeout=60)[0]
    assert process.returncode == 1
    assert not (cluster / "calls").exists()


def test_the_batch_script_is_in_the_documentation():
    assert (
        f"```bash\n{BATCH}```"
        in (mini.ROOT / "docs" / "guides" / "slurm-and-clusters.md").read_text()
    )


@pytest.mark.parametrize("state", ["RUNNING", "COMPLETING"])
def test_the_batch_script_to_copy(cluster, state):
    """With a warning the job is queued again and ends; with scancel it stays away."""
    home = cluster.parent / "runs" / "mini"
    (cluster / "state").write_text(f"{state}\n")
    script = BATCH.replace("experiment=cars trainer=multi_gpu restarts=10", "wait=heard end=2")
    script = script.replace("runs/cars", "runs/mini")
    assert script != BATCH
    (cluster.parent / "batch.sh").write_text(script)
    env = mini.environment(cluster)
    subprocess.run(
        ["sbatch", "batch.sh"],
        cwd=cluster.parent,
        env=env,
        check=True,
        capture_output=True,
        timeout=60,
    )
    run, _ = mini.pids(home)
    os.kill(run, signal.SIGUSR1)
    mini.there(home / "saved")
    again = state == "RUNNING"
    mini.there(home / "starts", lines=1 + again)
    assert mini.there(cluster / "exit.7").read_text() == ("2\n" if again else "75\n")
    assert mini.starts(home) == 1 + again
    assert calls(cluster, "scontrol") == ["requeue 7"] * again


@pytest.mark.slow
@submitit
def test_a_real_run_that_was_queued_again_ends_in_the_bits_of_an_undisturbed_one(cluster):
    tmp = cluster.parent
    words = [
        *command(
            tmp,
            "queued",
            "hydra/launcher=slurm",
            *striking.words("SIGUSR1", step=2, key="seed", value=0),
        ),
        "-m",
    ]
    env = mini.environment(cluster)
    done = subprocess.run(words, cwd=tmp, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert calls(cluster, "scontrol") == ["requeue 7"]
    output = next((tmp / "runs" / ".submitit").rglob("*_0_log.out")).read_text()
    assert "SIGUSR1: saved step 3" in output
    assert "resumed from step 3" in output
    train(tmp, "alone")
    assert differences(tmp, "alone", "queued") == []
