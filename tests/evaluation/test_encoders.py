"""Encoders give maps, and what they are made of is in their state."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from exact_resume.randomness import generator
from sturdy.encoders.encoder import Embedded, TorchScript, as_map


def some(n=24, size=16):
    return torch.randint(256, (n, 3, size, size), generator=generator("some"), dtype=torch.uint8)


def x0(n=4, size=16):
    return torch.rand(n, 3, size, size, generator=generator("x0")) * 2 - 1


def prepared(encoder, folder, *data):
    told = []
    pixels = some()
    encoder.prepare(
        pixels,
        torch.zeros(len(pixels), dtype=torch.int64),
        0,
        data=data,
        folder=folder,
        tell=lambda *a: told.append(a),
    )
    return encoder, bool(told)


def test_tokens_are_a_map_row_by_row_of_the_pictures_proportions():
    cells = torch.arange(2.0 * 5 * 12).reshape(2, 5, 3, 4)
    tokens = cells.flatten(2).transpose(1, 2)
    assert torch.equal(as_map(tokens, torch.zeros(2, 3, 24, 32)), cells)
    assert not torch.equal(as_map(tokens, torch.zeros(2, 3, 32, 24)), cells.transpose(2, 3))
    assert as_map(tokens, torch.zeros(2, 3, 32, 24)).shape == (2, 5, 4, 3)
    assert as_map(cells, torch.zeros(2, 3, 99, 1)) is cells
    for shape in (
        (2, 257, 5),
        (2, 12, 5),
        (2, 5),
    ):  # a class token; no square; features of whole pictures
        with pytest.raises(ValueError, match="make no map of an image of 224 x 224"):
            as_map(torch.zeros(shape), torch.zeros(2, 3, 224, 224))


def test_embedded_is_made_once_and_is_all_in_its_state(tmp_path):
    (first, made), (second, again) = (
        prepared(Embedded(image_size=16, seen=100), tmp_path, "digest") for _ in "ab"
    )
    assert (made, again) == (True, False)
    assert first(x0()).shape == (4, first.channels, 4, 4)
    assert torch.equal(first(x0()), second(x0()))
    empty = Embedded(image_size=16)
    assert not torch.equal(empty(x0()), first(x0()))
    empty.load_state_dict(first.state_dict())
    assert torch.equal(empty(x0()), first(x0()))
    other, made = prepared(Embedded(image_size=16, seen=200), tmp_path, "digest")
    assert made
    assert not torch.equal(other(x0()), first(x0()))
    assert not first.train().training, (
        "batch statistics would make an image's features depend on its neighbours"
    )
    assert torch.allclose(first(x0())[:1], first(x0()[:1]), atol=1e-5)
    with pytest.raises(ValueError, match=r"seen=0 must be"):
        Embedded(image_size=16, seen=0)


@pytest.mark.parametrize("path", [None, "nowhere.pt"])
def test_without_a_file_one_is_told_how_to_make_it_but_only_when_it_is_needed(path, tmp_path):
    encoder = TorchScript(path=path)
    with pytest.raises(ValueError, match="alignment=torchscript needs a file of weights") as told:
        prepared(encoder, tmp_path)
    assert "x_norm_patchtokens" in str(told.value)
    assert "give alignment.encoder.path=FILE. Or use alignment=embedded" in str(told.value)


class Patches(nn.Module):
    """As DINOv2: called plainly it gives a token for the whole picture, and its patches under a
    name.
    """

    def __init__(self, d):
        super().__init__()
        self.embed = nn.Conv2d(3, d, 14, 14)

    def forward_features(self, x):
        return {"x_norm_patchtokens": self.embed(x).flatten(2).transpose(1, 2)}

    def forward(self, x):
        return self.forward_features(x)["x_norm_patchtokens"].mean(1)


@pytest.mark.filterwarnings(
    "ignore"
)  # TorchScript is deprecated, but what such weights are handed round in
def test_a_file_made_as_one_is_told(tmp_path):
    net = Patches(8).requires_grad_(False).eval()
    expected = net.embed
    net.forward = lambda x: net.forward_features(x)["x_norm_patchtokens"]  # as the message has it
    torch.jit.trace(net, torch.rand(2, 3, 56, 56)).save(str(tmp_path / "net.pt"))
    encoder, _ = prepared(TorchScript(path=str(tmp_path / "net.pt"), channels=8, size=56), tmp_path)
    grey = encoder(torch.ones(3, 3, 16, 16))
    assert grey.shape == (3, 8, 4, 4)
    white = torch.tensor([0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225])[None, :, None, None].expand(
        3, 3, 56, 56
    )
    assert torch.allclose(grey, expected(white), atol=1e-4)
    assert len({encoder(x0()).numpy().tobytes() for _ in range(4)}) == 1, (
        "later calls round unlike the first"
    )

    assert list(encoder.state_dict()) == ["digest"]
    moved = TorchScript(
        path=str((tmp_path / "net.pt").rename(tmp_path / "moved.pt")), channels=8, size=56
    )
    moved.load_state_dict(encoder.state_dict())
    assert torch.equal(moved(x0()), encoder(x0()))
    torch.jit.trace(F.relu, torch.rand(2, 3, 56, 56)).save(str(tmp_path / "moved.pt"))
    again = TorchScript(path=str(tmp_path / "moved.pt"), channels=8, size=56)
    again.load_state_dict(encoder.state_dict())
    with pytest.raises(ValueError, match=r"moved\.pt is not the file that the run began with"):
        again(x0())
