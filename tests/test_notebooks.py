"""The notebooks run as they are, by Jupyter's own kernel, and hold no output."""

import json
import os

import pytest

from runs import ROOT, train

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def run(name, monkeypatch, **environment):
    """Run a notebook where it lies; return the text that it printed, and how many pictures."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), str(ROOT)]))
    for key, value in environment.items():
        monkeypatch.setenv(key, str(value))
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    folder = {"metadata": {"path": str(ROOT / "notebooks")}}
    nbclient.NotebookClient(notebook, timeout=300, resources=folder).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    pictures = sum("image/png" in output.get("data", ()) for output in outputs)
    return "".join(output.get("text", "") for output in outputs), pictures


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_output_is_kept_in_git(path):
    for cell in json.loads(path.read_text())["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_open_a_run(tmp_path, monkeypatch):
    train(tmp_path, "run", "trainer.max_steps=4")
    said, pictures = run("open_a_run", monkeypatch, RUN=tmp_path / "runs" / "run")
    assert "step 4, 32 images seen; classes: hatchback" in said
    assert pictures == 2


def test_tour_of_the_maths(monkeypatch):
    said, pictures = run("tour_of_the_maths", monkeypatch)
    rows = {line.split()[0]: line.split()[-1] for line in said.splitlines()}
    assert float(rows["data"]) == pytest.approx(1.25, abs=0.1)  # sqrt(pi / 2), in widths
    assert float(rows["Heun"]) == pytest.approx(1.25, abs=0.15)  # in 64 steps
    assert float(rows["distance:"]) < 5  # of the network: 8 or more for noise
    assert pictures == 5


@pytest.mark.slow
def test_from_folder_to_model(tmp_path, monkeypatch):
    said, pictures = run("from_folder_to_model", monkeypatch, WORK=tmp_path, STEPS=40)
    assert "killed; what is there: ['step-00000005'" in said
    assert "(bitwise" in said
    assert "finished at step 40" in said
    assert pictures == 2
