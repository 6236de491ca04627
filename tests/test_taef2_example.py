"""The space of examples/taef2, with random weights in the layout of TAEF2's files: it encodes,
trains, resumes and samples, and refuses other files.
"""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from exact_resume.randomness import Draws
from runs import ROOT, differences, fork, kill_at, train

safetensors = pytest.importorskip("safetensors.torch")

from examples.taef2.network import make_decoder, make_encoder  # noqa: E402
from examples.taef2.space import FILES, TAEF2  # noqa: E402

PLACE = "hydra.searchpath=[pkg://examples.taef2.conf]"
WORDS = [
    PLACE,
    "space=taef2",
    "data=folder",
    "trainer=cpu",
    "trainer.threads=1",
    "trainer.max_steps=6",
    "trainer.val_check_interval=3",
    "trainer.log_every_n_steps=1",
    "data.image_size=16",
    "data.batch_size=4",
    "data.flip=false",
    "sampler.steps=2",
    "callbacks.checkpoint.every_n_train_steps=2",
    "callbacks.samples=null",
]
DIT = ["backbone=dit", "backbone.patch=1", "backbone.width=16", "backbone.depth=1"]
UNET = [
    "backbone=unet",
    "backbone.patch=1",
    "backbone.width=8",
    "backbone.head_dim=8",
    "backbone.blocks=1",
    "backbone.multipliers=[1,2]",
    "backbone.attention=[False,True]",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with ``weights`` and ``photos``."""
    tmp = tmp_path_factory.mktemp("taef2")
    (tmp / "weights").mkdir()
    torch.manual_seed(0)
    for network, file in zip((make_encoder(), make_decoder()), FILES, strict=True):
        half = {name: tensor.half() for name, tensor in network.state_dict().items()}
        safetensors.save_file(half, tmp / "weights" / file)
    draw = np.random.default_rng(0)
    for k in range(24):
        file = tmp / "photos" / ("cat", "dog")[k % 2] / f"{k:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(file)
    return tmp


@pytest.fixture
def weights(home, tmp_path):
    """A copy of the two files that a test may damage."""
    for file in FILES:
        (tmp_path / file).write_bytes((home / "weights" / file).read_bytes())
    return tmp_path


def make(path, **arguments):
    plain = {"mean": [0.0] * 32, "std": [1.0] * 32}
    return TAEF2(path=str(path), **plain | arguments)


def images(count=3, size=16):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_shapes_and_ranges(home):
    space = make(home / "weights")
    x0 = space.encode(images(), Draws(0, range(3)))
    assert x0.shape == (3, *space.shape(16)) == (3, 32, 2, 2)
    assert x0.dtype == torch.float32
    decoded = space.decode(100 * x0)
    assert decoded.shape == (3, 3, 16, 16)
    assert decoded.abs().max() <= 1
    with pytest.raises(ValueError, match="image_size=20 must be a multiple of 8"):
        space.shape(20)


def test_an_image_has_one_latent_however_it_is_encoded(home):
    space = make(home / "weights")
    x0 = space.encode(images(), Draws(0, range(3)))
    assert torch.equal(x0, space.encode(images(), Draws(1, range(7, 10))))
    assert torch.equal(x0[1:2], space.encode(images()[1:2], None))
    assert torch.equal(space.decode(x0), make(home / "weights").decode(x0))
    moments = torch.cat([space.moments(image) for image in images().split(1)])
    assert torch.equal(x0, space.encode(moments, Draws(0, range(3))))
    assert not x0.requires_grad


def test_mean_and_std_are_taken_out_and_put_back(home):
    plain = make(home / "weights")
    latent = plain.encode(images(), None)
    mean, std = latent.mean((0, 2, 3)), latent.std((0, 2, 3))
    space = make(home / "weights", mean=mean.tolist(), std=std.tolist())
    x0 = space.encode(images(), None)
    torch.testing.assert_close(x0.mean((0, 2, 3)), torch.zeros(32), atol=1e-5, rtol=0)
    torch.testing.assert_close(x0.std((0, 2, 3)), torch.ones(32))
    torch.testing.assert_close(space.decode(x0), plain.decode(latent), atol=1e-5, rtol=0)


@pytest.mark.parametrize("file", FILES)
def test_the_key_is_of_every_byte(weights, file):
    before = make(weights).key()
    assert before == make(weights).key()
    content = bytearray((weights / file).read_bytes())
    content[-1] ^= 1
    (weights / file).write_bytes(content)
    assert make(weights).key() != before


@pytest.mark.parametrize("file", FILES)
def test_wrong_files_are_refused_in_one_line(weights, file):
    content = (weights / file).read_bytes()
    (weights / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"^path=.*: {file} is incomplete or no safetensors"):
        make(weights)
    other = safetensors.load(content)
    del other[next(iter(other))]
    safetensors.save_file(other, weights / file)
    with pytest.raises(ValueError, match=rf"^path=.*: {file} is not TAEF2's: .* is missing and"):
        make(weights)
    (weights / file).unlink()
    with pytest.raises(ValueError, match=rf"^path=.* has no {file}; ") as error:
        make(weights)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 16}, "channels=16 must be 32"),
        ({"mean": [0.0]}, "mean= must be 32 numbers, not 1"),
        ({"std": [1.0] * 31 + [0.0]}, "std= must be above 0"),
    ],
)
def test_wrong_arguments_are_refused(home, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(home / "weights", **arguments)


@pytest.fixture(scope="module")
def words(home):
    return [*WORDS, f"space.path={home / 'weights'}", f"data.root={home / 'photos'}"]


@pytest.fixture(scope="module")
def once(home, words):
    """A run that nobody has disturbed; its name."""
    train(home, "once", *DIT, base=words)
    return "once"


def test_killed_it_ends_in_the_same_bits(home, words, once):
    kill_at(home, "killed", 4, *DIT, base=words, saved=True)
    assert "resumed from step" in train(home, "killed", *DIT, base=words).stdout
    assert differences(home, once, "killed") == []


def test_its_run_is_sampled(home, once):
    options = [f"paths.runs={home / 'runs'}", f"run={once}", "sample.n=2", "threads=1"]
    process, out, err = fork(home, "sample", [str(ROOT / "sample.py"), *options])
    process.join(120)
    assert process.exitcode == 0, out.read_text() + err.read_text()
    drawn = sorted((home / "runs" / once / "pictures").glob("0*.png"))
    assert [Image.open(path).size for path in drawn] == [(16, 16)] * 2


def test_the_unet_trains_on_it(home, words):
    assert "fresh, to step 6" in train(home, "unet", *UNET, base=words).stdout


def test_a_run_refuses_other_weights(home, words, once):
    file = home / "weights" / FILES[1]
    content = file.read_bytes()
    more = [*DIT, "trainer.max_steps=8"]
    try:
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        refused = train(home, once, *more, base=words, code=2).stderr
        assert "space.key" in refused
        file.unlink()
        refused = train(home, once, *more, base=words, code=2).stderr
        assert f"space.path={file.parent} has no {file.name}" in refused
        assert "Traceback" not in refused
    finally:
        file.write_bytes(content)


PAGE = ROOT / "docs" / "extend" / "pretrained-space.md"
BLOCK = re.compile(
    r"^The file `(examples/taef2/[\w/.]+)`:\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL
)


def test_the_page_shows_the_files_that_were_tested():
    shown = dict(BLOCK.findall(PAGE.read_text()))
    assert {"examples/taef2/space.py", "examples/taef2/conf/space/taef2.yaml"} <= shown.keys()
    for name, text in shown.items():
        assert text == (ROOT / name).read_text(), name
