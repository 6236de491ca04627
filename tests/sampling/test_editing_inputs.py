"""Pictures from a picture, through the door: what is kept is kept to the bit; more strength changes
more.
"""

import itertools

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image

from runs import ROOT, train
from sturdy.cli.overrides import check_composed
from sturdy.data.decode import decode
from sturdy.sampling.sample import main

NUMBERS = itertools.count()  # of output folders, as each holds what one command made


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A directory with the finished run ``run``, a picture, and masks."""
    tmp = tmp_path_factory.mktemp("edit")
    train(tmp, "run", "trainer.max_steps=2", "callbacks.samples.every_n_steps=null")
    y, x = np.mgrid[0:40, 0:60]
    Image.fromarray(np.stack([4 * x, 6 * y, 3 * (x + y) % 256], -1).astype(np.uint8)).save(
        tmp / "car.png"
    )
    white = {"left": x < 30, "nothing": x < 0, "outside": x < 10}
    for name, where in white.items():
        Image.fromarray((255 * where).astype(np.uint8)).save(tmp / f"{name}.png")
    Image.new("L", (40, 40), 255).save(tmp / "square.png")
    (tmp / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 torn")
    return tmp


@pytest.fixture
def edited(files, capsys, monkeypatch):
    """Draw two pictures in this process: the exit code, what was said, and the pixels ``(2, 16, 16,
    3)``.
    """
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    monkeypatch.chdir(files)

    def start(*words):
        out = f"out-{next(NUMBERS)}"
        words = ["paths.runs=runs", "run=run", "sample.n=2", f"sample.out={out}", *words]
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            cfg = compose("sample", words)
        check_composed(cfg)
        code = main(cfg, words)
        said = capsys.readouterr()
        pixels = (
            [np.asarray(Image.open(f"{out}/{k:06d}.png")).astype(int) for k in range(2)]
            if not code
            else []
        )
        return code, said.out + said.err, np.array(pixels)

    yield start
    torch.use_deterministic_algorithms(False)


def test_what_is_black_in_the_mask_is_kept_to_the_bit(files, edited):
    picture = decode(files / "car.png", size=16).transpose(1, 2, 0).astype(int)
    for sampler in ("heun", "dpm_solver_sde"):
        code, said, pixels = edited(
            "sample.image=car.png", "sample.mask=left.png", f"sampler={sampler}", "sampler.steps=3"
        )
        assert code == 0, said
        assert (pixels[:, :, 8:] == picture[:, 8:]).all()
        assert (
            pixels[0, :, :8] != pixels[1, :, :8]
        ).mean() > 0.9  # drawn anew, from noise of its own
        assert (pixels[0, :, :8] != picture[:, :8]).mean() > 0.9


def test_more_strength_changes_more_and_all_of_it_is_another_picture(files, edited):
    picture = decode(files / "car.png", size=16).transpose(1, 2, 0).astype(int)
    words = ["sample.image=car.png", "sampler=ddim", "sampler.steps=4", "guidance.scale=1"]
    far = [
        abs(edited(*words, f"sample.strength={s}")[2] - picture).mean() for s in (0.02, 0.3, 0.9)
    ]
    assert far[0] < 12 < far[1] < far[2]
    assert np.array_equal(edited(*words)[2], edited(*words, "sample.strength=0.6")[2])
    at_end, from_noise = edited(*words, "sample.strength=1")[2], edited(*words[1:])[2]
    assert np.array_equal(at_end, from_noise)  # alpha(1) of a rectified flow is 0


def test_a_mask_with_strength_begins_at_the_picture(files, edited):
    words = [
        "sample.image=car.png",
        "sample.mask=left.png",
        "sampler=ddim",
        "sampler.steps=4",
        "guidance.scale=1",
    ]
    picture = decode(files / "car.png", size=16).transpose(1, 2, 0).astype(int)
    little, all_of_it = (edited(*words, f"sample.strength={s}")[2] for s in (0.02, 1))
    assert (little[:, :, 8:] == picture[:, 8:]).all()
    assert abs(little - picture).mean() < 12 < abs(all_of_it - picture)[:, :, :8].mean()
    assert np.array_equal(all_of_it, edited(*words)[2])


REFUSALS = {
    "sample.image=gone.png": "sample.image=gone.png: no such file",
    "sample.image=torn.jpg": "sample.image=torn.jpg: ",
    "sample.image=car.png sample.mask=gone.png": "sample.mask=gone.png: no such file",
    "sample.image=car.png sample.mask=square.png": "16 x 16 where sample.image=car.png is 24 x 16",
    "sample.image=car.png sample.mask=nothing.png": "nothing.png has no white",
    "sample.image=car.png sample.strength=0": "sample.strength=0 must be above 0",
    "sample.image=car.png sample.strength=1.5": "sample.strength=1.5 must be above 0",
    "sample.image=car.png sample.strength=much": "sample.strength=much must be above 0",
    "sample.mask=left.png": "sample.mask=left.png needs an image to change: sample.image=FILE",
    "sample.strength=0.5": "sample.strength=0.5 needs an image to change: sample.image=FILE",
}


def test_refusals_name_the_key_and_the_file(edited):
    for words, answer in REFUSALS.items():
        code, said, _ = edited(*words.split())
        assert (code, answer in said, "Traceback" in said) == (2, True, False), f"{words}: {said}"
