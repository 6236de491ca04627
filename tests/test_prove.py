"""The proof that users run: it proves where the promise holds, and fails where a mechanism is taken away."""

import subprocess
import sys

import pytest

from runs import ROOT, SMALL


def prove(tmp_path, *words):
    paths = [f"paths.runs={tmp_path / 'runs'}", f"paths.cache={tmp_path / 'cache'}", "name=it"]
    command = [sys.executable, str(ROOT / "prove.py"), *SMALL, *paths, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=500)


def test_proves_the_promise(tmp_path):
    done = prove(tmp_path, "kills=2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "once against twice: every tensor equal; every logged value equal" in done.stdout
    assert "once against killed: every tensor equal; every logged value equal" in done.stdout
    assert "PROVED: the killed run ended in the same bits" in done.stdout


@pytest.mark.parametrize(
    "mechanism", ["noise", *(pytest.param(m, marks=pytest.mark.slow) for m in ("order", "dropout"))]
)
def test_control_fails_without_the_mechanism(mechanism, tmp_path):
    done = prove(tmp_path, "kills=1", f"break={mechanism}", "trainer.max_steps=24")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "once against twice: every tensor equal" in done.stdout
    assert "first difference at step" in done.stdout
    assert "NOT PROVED: undisturbed runs agree, and the killed one does not" in done.stdout


@pytest.mark.parametrize(
    ("words", "text"),
    [(["kills=many"], "usage: "), (["break=luck"], "usage: "), (["data.batchsize=3"], "Did you mean data.batch_size")],
)
def test_mistakes_start_nothing(words, text, tmp_path):
    done = prove(tmp_path, *words)
    assert done.returncode == 2
    assert text in done.stderr
    assert not (tmp_path / "runs").exists()
