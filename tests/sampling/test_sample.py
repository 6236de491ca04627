"""Images by their number: the same bits however they are cut into jobs, and drawn once, through
SIGKILL.
"""

import os

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image

from runs import ROOT, fork, train
from sturdy.sampling.sample import is_complete, main


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The directory of a finished run of two validated steps."""
    tmp = tmp_path_factory.mktemp("draw")
    words = [
        "trainer.max_steps=2",
        "trainer.val_check_interval=1",
        "callbacks.checkpoint.every_n_train_steps=1",
    ]
    train(tmp, "run", *words, "callbacks.samples.every_n_steps=null")
    return tmp / "runs" / "run"


@pytest.fixture
def drawn(home, capsys, monkeypatch):
    """Draw in this process: the exit code and what was said."""
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)

    def start(*words):
        words = [f"paths.runs={home.parent}", "run=run", "sampler.steps=2", "device=cpu", *words]
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            cfg = compose("sample", words)
        code = main(cfg, words)
        said = capsys.readouterr()
        return code, said.out + said.err

    yield start
    torch.use_deterministic_algorithms(False)


def images(folder):
    return {path.name: np.array(Image.open(path)) for path in sorted(folder.glob("0*.png"))}


def times(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("0*.png")}


def test_an_image_is_a_function_of_its_number(drawn, tmp_path):
    """However many are drawn, together or by several jobs; kernels may round differently, by a grey
    level at most.
    """
    assert drawn("sample.n=11", "sample.batch_size=11", f"sample.out={tmp_path / 'whole'}")[0] == 0
    for first, n, batch_size in ((0, 5, 2), (5, 6, 4)):
        words = [f"sample.first={first}", f"sample.n={n}", f"sample.batch_size={batch_size}"]
        assert drawn(*words, f"sample.out={tmp_path / 'parts'}")[0] == 0
    whole, parts = images(tmp_path / "whole"), images(tmp_path / "parts")
    assert list(whole) == list(parts) == [f"{k:06d}.png" for k in range(11)]
    assert all(abs(whole[name].astype(int) - parts[name]).max() <= 1 for name in whole)
    assert len({image.tobytes() for image in whole.values()}) == 11
    assert (tmp_path / "parts" / "grid.png").exists()
    assert (tmp_path / "parts" / "grid-000005.png").exists()


def test_what_is_complete_is_not_drawn_again(drawn, tmp_path):
    words = ["sample.batch_size=2", f"sample.out={tmp_path}"]
    assert drawn("sample.n=6", *words)[0] == 0
    before, then = images(tmp_path), times(tmp_path)
    (tmp_path / "000001.png").unlink()
    os.truncate(tmp_path / "000004.png", 200)
    assert not is_complete(tmp_path / "000004.png", (16, 16))
    code, said = drawn("sample.n=8", *words)
    assert code == 0
    assert "8 images from step 2" in said
    assert "(4 were there)" in said
    after, now = images(tmp_path), times(tmp_path)
    assert len(after) == 8
    assert all(np.array_equal(after[name], image) for name, image in before.items())
    assert {name for name in then if now[name] == then[name]} == then.keys() - {
        "000001.png",
        "000004.png",
    }


def test_killed_it_goes_on_where_it_was(home, drawn, tmp_path):
    words = ["sample.n=40", "sample.batch_size=4"]
    assert drawn(*words, f"sample.out={tmp_path / 'whole'}")[0] == 0
    options = [
        f"paths.runs={home.parent}",
        "run=run",
        "sampler.steps=2",
        "device=cpu",
        "threads=1",
        *words,
    ]
    out = tmp_path / "killed"
    process, *said = fork(
        tmp_path, "killed", [str(ROOT / "sample.py"), *options, f"sample.out={out}"]
    )
    while process.exitcode is None and len(times(out)) < 9:
        pass
    process.kill()
    process.join()
    then = times(out)
    assert 9 <= len(then) < 40, [path.read_text() for path in said]
    assert drawn(*words, f"sample.out={out}")[0] == 0
    assert {name: time for name, time in times(out).items() if name in then} == then
    whole, killed = images(tmp_path / "whole"), images(out)
    assert all(np.array_equal(whole[name], killed[name]) for name in whole)
    assert len(killed) == 40


def test_a_grid_shows_the_first_and_the_others_are_not_held(drawn, tmp_path):
    code, said = drawn(
        "sample.n=70", "sample.batch_size=35", "sampler.steps=1", f"sample.out={tmp_path}"
    )
    assert code == 0
    assert "grid.png shows the first 64" in said
    width, height = Image.open(tmp_path / "grid.png").size
    assert (width // 66) * (height // 66) == 64  # tiles of 64 pixels, and two between them


def test_nothing_that_another_command_made_is_overwritten(home, drawn):
    assert drawn("sample.n=2")[0] == 0
    before = times(home / "pictures")
    code, said = drawn("sample.n=2", "sample.seed=1")
    assert code == 0
    assert f"2 images from step 2 of {home} are in {home / 'pictures-2'}" in said
    assert times(home / "pictures") == before
    code, said = drawn("sample.n=2", "sample.seed=1", f"sample.out={home / 'pictures'}")
    assert code == 2
    assert f"sample.out={home / 'pictures'} holds what another command made (seed: 0 -> 1)" in said


MISTAKES = {
    "sample.n=0": "sample.n=0 must be a whole number of at least 1",
    "sample.first=-1": "sample.first=-1 must be a whole number of at least 0",
    "sample.batch_size=0": "sample.batch_size=0 must be",
    "sample.seed=1.5": "sample.seed=1.5 must be a whole number",
    "threads=0": "threads=0 must be a whole number of at least 1",
    "device=tpu": "device=tpu is not there",
    "run=rum": "run=rum is not there; paths.runs=",
    "ckpt_path=7": "has the steps 1, 2",
    "sample.label=true": "sample.label=true is no class of this run; there are: hatchback",
    "sample.strength=true sample.image=a.png": "sample.strength=True must be above 0",
    "sample.out=/proc/x": "sample.out=/proc/x cannot be written in",
}


def test_mistakes_are_answered_in_a_line_that_names_the_key(drawn):
    for words, text in MISTAKES.items():
        code, said = drawn(*words.split())
        assert (code, text in said, said.count("\n")) == (2, True, 1), f"{words}: {said}"


def test_the_best_and_a_step_are_drawn_from(drawn, tmp_path):
    for word, step in {"1": 1, "step-00000002": 2, "best": None}.items():
        code, said = drawn("sample.n=1", f"ckpt_path={word}", f"sample.out={tmp_path / word}")
        assert code == 0, said
        assert step is None or f"from step {step} of" in said
