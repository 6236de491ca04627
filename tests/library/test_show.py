"""What ``python -m exact_resume show`` says of a file; and that it executes nothing."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from exact_resume.__main__ import main
from exact_resume.checkpoint.store import Store
from exact_resume.weights_file import WeightsFile
from runs import ROOT
from untrusted_files import WEIGHTS, Calls, save_lightning


def shown(capsys, path):
    code = main(["show", str(path)])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_lightning_file(tmp_path, capsys):
    code, out, _ = shown(capsys, save_lightning(tmp_path / "a.ckpt"))
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == str(tmp_path / "a.ckpt")
    assert lines[1].startswith("format      torch, ")
    assert lines[1].endswith(" kB")
    assert "step        470,000" in lines
    assert "metadata    pytorch-lightning_version: 1.4.2" in lines
    assert "averages    yes (EMA): model_ema" in lines
    assert (
        "imports     pytorch_lightning.callbacks.early_stopping.EarlyStopping (harmless; left out)"
        in lines
    )
    rows = {line.split()[0]: line.split()[1:] for line in lines[-5:]}
    assert rows["module"] == ["tensors", "parameters", "dtype"]
    assert rows["model"] == ["2", "15", "float32,", "float16"]
    assert rows["model_ema"] == ["1", "12", "float32"]
    assert rows["total"] == ["4", "28", "float32,", "float16,", "int64"]
    assert "(no module)" in lines[-2]


def test_safetensors(tmp_path, capsys):
    save_file = pytest.importorskip("safetensors.torch").save_file
    metadata = {"license": "MIT", "long": "x" * 500, "evil": "\x1b[2J"}
    save_file({"a.weight": torch.ones(3)}, tmp_path / "a", metadata)
    code, out, _ = shown(capsys, tmp_path / "a")
    assert code == 0
    assert "metadata    license: MIT" in out
    assert "averages    no (EMA)" in out
    assert max(map(len, out.splitlines())) < 150
    assert "\x1b" not in out


def test_a_malicious_file_is_described_and_not_executed(tmp_path):
    """As a user starts it, and without safetensors."""
    canary = tmp_path / "canary"
    path = save_lightning(tmp_path / "a.ckpt", callbacks=[Calls(os.system, f"touch {canary}")])
    (tmp_path / "safetensors.py").write_text("raise ImportError")
    done = subprocess.run(
        [sys.executable, "-m", "exact_resume", "show", str(path)],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT / 'src'}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith(f"refused: {path} would import posix.system")
    assert "imports     posix.system (REFUSED)" in done.stdout
    assert "imports     builtins.dict (harmless)" in done.stdout
    assert "Traceback" not in done.stderr
    assert not canary.exists()


def test_checkpoints_and_runs(tmp_path, capsys):
    store = Store(tmp_path / "checkpoints")
    for step in (3, 6):
        state = {"global_step": step, "state_dict": {"net.w": torch.ones(5)}, "epoch": 1}
        store.commit(step, state)
    for path in (tmp_path, store.path(6), store.state(6)):
        code, out, _ = shown(capsys, path)
        assert code == 0
        assert "step        6" in out
        assert "verified    yes" in out
        assert "entries     global_step, epoch" in out
        assert "net " in out
    damaged = store.state(6)
    damaged.write_bytes(damaged.read_bytes() + b"\0")
    code, out, _ = shown(capsys, damaged)
    assert code == 1
    assert "refused: " in out or "verified    NO: " in out


def test_a_folder_of_a_model(tmp_path, capsys):
    for part, suffix in (("unet", "safetensors"), ("vae", "bin")):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps({"_class_name": part.title()}))
        if suffix == "bin":
            torch.save(WEIGHTS, tmp_path / part / "model.bin")
        else:
            save_file = pytest.importorskip("safetensors.torch").save_file
            save_file(WEIGHTS, tmp_path / part / "model.safetensors")
    (tmp_path / "model_index.json").write_text("{}")
    code, out, _ = shown(capsys, tmp_path)
    assert code == 0
    rows = [line.split() for line in out.splitlines()[2:]]
    assert [[row[0], *row[2:]] for row in rows] == [
        ["unet/model.safetensors", "kB", "28", "Unet"],
        ["vae/model.bin", "kB", "28", "Vae"],
    ]
    (tmp_path / "vae" / "model.bin").write_bytes(b"<html>")
    code, out, _ = shown(capsys, tmp_path)
    assert code == 1
    assert out.splitlines()[-1].endswith(
        "is a web page, not weights: the download failed or needs a login"
    )


@pytest.mark.parametrize(
    ("make", "code", "text"),
    [
        (lambda path: None, 2, "is not there"),
        (lambda path: path.mkdir(), 1, "holds no files of weights, no checkpoint and no run"),
        (lambda path: path.write_bytes(b""), 1, "is empty"),
        (lambda path: torch.save(nn.Linear(2, 2), path), 1, "(REFUSED)"),
    ],
)
def test_mistakes(make, code, text, tmp_path, capsys):
    make(tmp_path / "a")
    found, out, err = shown(capsys, tmp_path / "a")
    assert found == code
    assert text in out + err


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that describes files: the source of its function is filled in by a test."""
    info = tmp_path / "site" / "describer-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: describer\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[exact_resume.describe]\nx = describer:describe\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    yield tmp_path / "site" / "describer.py"
    sys.modules.pop("describer", None)


def test_other_packages_add_lines(package, tmp_path, capsys):
    package.write_text("def describe(file):\n    return [f'family      {len(file.tensors)}']\n")
    torch.save(WEIGHTS, tmp_path / "a.ckpt")
    code, out, _ = shown(capsys, tmp_path / "a.ckpt")
    assert code == 0
    assert "family      4" in out.splitlines()


@pytest.mark.parametrize("body", ["return [1 / 0]", "yield 1 / 0", "return None"])
def test_a_package_that_fails_breaks_nothing(body, package, tmp_path, capsys):
    package.write_text(f"def describe(file):\n    {body}\n")
    torch.save(WEIGHTS, tmp_path / "a.ckpt")
    code, out, _ = shown(capsys, tmp_path / "a.ckpt")
    assert code == 0
    assert "note        describer:describe failed: " in out
    assert "total" in out


def test_a_package_that_cannot_be_imported_breaks_nothing(package, tmp_path, capsys):
    package.write_text("import not_there\n")
    torch.save(WEIGHTS, tmp_path / "a.ckpt")
    assert "failed: No module named 'not_there'" in shown(capsys, tmp_path / "a.ckpt")[1]


def test_the_template_registers_its_description():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["exact_resume.describe"]["sturdy"].partition(":")
    describe = getattr(__import__(module, fromlist=[name]), name)
    file = WeightsFile(ROOT / "x", "torch", {}, {"net.w": torch.ones(1)})
    assert describe(file) == ["family      none: it is no model known here (it has net)"]
