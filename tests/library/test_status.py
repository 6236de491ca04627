"""What is said about a run's store; and that nothing in it is touched."""

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from exact_resume.__main__ import main
from exact_resume.checkpoint import store as store_module
from exact_resume.checkpoint.store import MANIFEST, STATE, Store
from exact_resume.fingerprint import fingerprint
from runs import ROOT

CONFIG = {
    "trainer": {"threads": torch.get_num_threads(), "max_steps": 12, "deterministic": True},
    "callbacks": {"checkpoint": {"monitor": "val/loss", "mode": "min"}},
}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The directory ``runs/a`` of an interrupted run, from above."""
    monkeypatch.chdir(tmp_path)
    return make("runs/a")


def make(name, config=CONFIG, steps=(3, 6, 9)):
    store = Store(os.path.join(name, "checkpoints"))
    for step in steps:
        weights = {"weights": torch.full((250_000,), float(step))}
        then = fingerprint(config, "digest").as_dict()
        store.commit(
            step, {"global_step": step} | weights, fingerprint=then, time=time.time() - 7300
        )
    with open(os.path.join(name, "metrics.csv"), "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows(
            [
                ["step", "train/loss", "val/loss"],
                [3, 1, 0.5],
                [6, 1, ""],
                [6, "", 0.25],
                [9, 1, "nan"],
            ]
        )
        file.write("9,,0.1")  # cut short
    return store


def seal(store, step, **changes):
    """Change facts of a manifest as if they had been written like this; None takes one away."""
    path = store.path(step) / MANIFEST
    manifest = json.loads(path.read_bytes()) | changes
    del manifest["sha256"]
    manifest = {k: v for k, v in manifest.items() if v is not None}
    path.write_bytes(
        json.dumps(manifest | {"sha256": store_module.manifest_hash(manifest)}, indent=1).encode()
    )


def flip(store, step):
    data = bytearray(store.state(step).read_bytes())
    data[len(data) // 2] ^= 1
    store.state(step).write_bytes(data)


def files(directory="."):
    """All there is, with its content and times."""
    found = {}
    for folder, _, names in os.walk(directory):
        for path in (folder, *(os.path.join(folder, name) for name in names)):
            content = Path(path).read_bytes() if os.path.isfile(path) else None
            found[path] = (content, os.lstat(path).st_mtime_ns)
    return found


def said(capsys, *words):
    before = files()
    code = main(list(words))
    assert files() == before
    out, err = capsys.readouterr()
    assert all(len(line) <= 80 and line == line.rstrip() for line in out.splitlines()), out
    return code, out, err


def test_an_interrupted_run(run, capsys):
    code, out, _ = said(capsys, "status", "runs/a")
    assert code == 0
    head, *rows, outlook = out.splitlines()
    assert head.split() == ["step", "age", "size", "verified", "val/loss"]
    assert [row.split() for row in rows] == [
        ["3", "2", "h", "1.0", "MB", "yes", "0.5"],
        ["6", "2", "h", "1.0", "MB", "yes", "0.25", "best"],
        ["9", "2", "h", "1.0", "MB", "yes", "last"],
    ]
    assert outlook == "the same command would resume from step 9, bitwise"


def test_in_a_pipe_it_is_plain_text(run):
    then = fingerprint(CONFIG, "digest").as_dict() | {"code": {"__main__": "of the run's script"}}
    seal(run, 9, fingerprint=then)
    command = [sys.executable, "-m", "exact_resume", "status", "runs/a"]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT / "src"),
        "LC_ALL": "C",
        "OMP_NUM_THREADS": str(threads()),
    }
    done = subprocess.run(command, capture_output=True, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.isascii()
    assert b"\x1b" not in done.stdout
    assert len(done.stdout.splitlines()) == 5
    assert b"resume from step 9, bitwise" in done.stdout


def threads():
    return CONFIG["trainer"]["threads"]


def test_one_that_does_not_verify_stays_where_it_is_and_is_passed_over(run, capsys):
    flip(run, 9)
    for word in ("status", "verify"):
        code, out, _ = said(capsys, word, "runs/a")
        assert code == 1
        assert "step-00000009 does not verify: state.ckpt has changed" in out
    assert "2 of 3 checkpoints verify" in out
    out = said(capsys, "status", "runs/a")[1]
    assert [row.split()[5:] for row in out.splitlines()[1:4]] == [
        ["yes", "0.5"],
        ["yes", "0.25", "last,", "best"],
        [],
    ]
    assert out.splitlines()[3].split() == ["9", "1.0", "MB", "NO"]
    assert "the same command would resume from step 6, bitwise" in out


def test_all_is_well(run, capsys):
    assert said(capsys, "verify", "runs/a") == (0, "3 of 3 checkpoints verify\n", "")


def test_nothing_verifies(run, capsys):
    for step in run.steps():
        flip(run, step)
    for moved in (False, True):
        code, out, _ = said(capsys, "status", "runs/a")
        assert code == 1
        assert "no checkpoint verifies, so the run cannot continue" in out
        assert "use a new directory" in " ".join(out.split())
        assert ("did not verify" in out) == moved
        with pytest.raises(store_module.NoValidCheckpointError):
            run.last(quarantine=True)
    assert said(capsys, "verify", "runs/a")[:2] == (1, "0 of 0 checkpoints verify\n")


def test_what_was_put_aside_is_told(run, capsys, tmp_path):
    flip(run, 9)
    run.last(quarantine=True)
    run.move_newer(3, tmp_path / "runs" / "a" / "abandoned" / "001")
    (tmp_path / "runs" / "a" / "skips.jsonl").write_text("{}\n{}\n")
    code, out, _ = said(capsys, "status", "runs/a")
    assert code == 0
    assert "runs/a/checkpoints/quarantine (did not verify): step-00000009." in " ".join(out.split())
    assert "runs/a/abandoned (replaced by another branch): 001" in out
    assert "skipped batches: 2, in runs/a/skips.jsonl" in out
    assert "would resume from step 3, bitwise" in out


def test_a_finished_run(run, capsys):
    make("runs/b", {"trainer": {**CONFIG["trainer"], "max_steps": 9}})
    code, out, _ = said(capsys, "status", "runs/b")
    assert (code, out.splitlines()[-1]) == (0, "finished at step 9")


def test_the_best_is_the_largest_where_it_is_to_be_maximised(run, capsys):
    make("runs/b", CONFIG | {"callbacks": {"checkpoint": {"monitor": "val/loss", "mode": "max"}}})
    out = said(capsys, "status", "runs/b")[1]
    assert out.splitlines()[1].endswith("0.5  best")


def test_another_stack_or_source_is_told(run, capsys):
    then = fingerprint(CONFIG, "digest").as_dict()
    seal(run, 9, fingerprint=then | {"stack": then["stack"] | {"torch": "0.1"}})
    out = " ".join(said(capsys, "status", "runs/a")[1].split())
    assert (
        f"the same command would resume from step 9, same samples: torch: 0.1 -> "
        f"{torch.__version__}" in out
    )
    seal(run, 9, fingerprint=then | {"code": {"exact_resume.randomness": "0"}})
    out = " ".join(said(capsys, "status", "runs/a")[1].split())
    assert "the same command would refuse to resume from step 9" in out
    assert "the code changed, 1 of 1 modules: exact_resume.randomness" in out


@pytest.mark.parametrize("missing", ["fingerprint", "config", "data", "code", "stack", "time"])
def test_a_manifest_of_another_version_is_no_reason_to_fail(missing, run, capsys):
    then = fingerprint(CONFIG, "digest").as_dict()
    if missing in then:
        seal(run, 9, fingerprint={k: v for k, v in then.items() if k != missing})
    else:
        seal(run, 9, **{missing: None})
    code, out, _ = said(capsys, "status", "runs/a")
    assert code == 0
    assert "step 9" in out


def test_a_run_without_checkpoints(run, capsys, tmp_path):
    (tmp_path / "runs" / "empty").mkdir()
    code, out, _ = said(capsys, "status", "runs/empty")
    assert (code, out) == (1, "runs/empty has no checkpoint; the same command would start afresh\n")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "usage: "),
        (["status"], "usage: "),
        (["mend", "runs/a"], "usage: "),
        (["status", "runs/a", "runs/a"], "usage: "),
        (
            ["status", "runs/nobody"],
            "runs/nobody is not there; give the directory of a run, such as runs/cars",
        ),
        (["status", f"runs/a/checkpoints/step-00000009/{STATE}"], "is not there"),
    ],
)
def test_mistakes(words, text, run, capsys):
    code, out, err = said(capsys, *words)
    assert (code, out) == (2, "")
    assert text in err
