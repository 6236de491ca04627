"""What is shown of attention is what the networks compute, and what is said of it is known where
the answer is.
"""

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from exact_resume.randomness import generator
from sturdy.backbone import dit, unet
from sturdy.diffusion.denoiser import Denoiser
from sturdy.diffusion.schedule import RectifiedFlow
from sturdy.diffusion.target import Velocity
from sturdy.encoders.images import ImageSet, scaled
from sturdy.evaluation.attention import (
    LEVELS,
    Attends,
    attention_maps,
    attention_section,
    attention_weights,
    record_attention,
    token_at,
)
from sturdy.evaluation.levels import Denoising
from sturdy.evaluation.report import Report

SIZE = 16
DIT = {"width": 16, "depth": 4, "heads": 2, "num_classes": 3}
UNET = {
    "width": 8,
    "multipliers": (1, 2),
    "blocks": 1,
    "attention": (False, True),
    "head_dim": 8,
    "num_classes": 3,
}
NETWORKS = {"dit": lambda: dit.DiT(**DIT), "unet": lambda: unet.UNet(**UNET)}


def random(*shape, name="attention"):
    return torch.randn(shape, generator=generator(name))


def awake(network):
    """Layers that start at zero get weights, so that all that is computed is in the result."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.2)
    return network.eval()


def layers():
    """Of both kinds, with arguments as they get them."""
    turn = dit.rotation(3, 5, 8, like=torch.empty(0))
    yield awake(dit.Attention(16, heads=2)), (random(2, 15, 16), turn)
    yield awake(unet.Attention(16, head_dim=8)), (random(2, 16, 3, 5),)


def after(layer, mixed, args):
    """What ``layer`` makes of values mixed by attention, ``(b, heads, tokens, d)``."""
    out = layer.out(mixed.transpose(1, 2).flatten(2))
    return out if args[0].ndim == 3 else args[0] + out.unflatten(1, (3, 5)).permute(0, 3, 1, 2)


@pytest.mark.parametrize(("layer", "args"), list(layers()), ids=NETWORKS)
def test_weights_are_those_of_forward(layer, args):
    q, k, v = layer.queries_keys_values(*args)
    assert torch.equal(layer(*args), after(layer, F.scaled_dot_product_attention(q, k, v), args))
    found = attention_weights(q, k)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 2, 15))
    torch.testing.assert_close(layer(*args), after(layer, found @ v, args), rtol=0, atol=1e-5)
    assert not torch.allclose(
        layer(*args), after(layer, attention_weights(k, q) @ v, args), atol=1e-3
    )  # the control
    assert isinstance(layer, Attends)


def test_distances_that_are_known():
    """Queries equal to keys of great length attend to themselves alone; of none, to all alike."""
    height, width, side = 12, 20, 4
    tokens = height * width // side**2
    q = F.one_hot(torch.arange(tokens)).float().expand(2, 3, -1, -1)
    itself, everywhere = (
        attention_maps(1000 * q, q, height, width),
        attention_maps(0 * q, q, height, width),
    )
    torch.testing.assert_close(itself.distance, torch.zeros(2))
    assert itself.maps.shape == (2, 2, 3, 5)
    assert [m.argmax().item() for m in itself.maps[0]] == [1 * 5 + 2, 1]
    assert token_at((0.5, 0.5), 3, 5) == (1, 2)
    places = [(side * row, side * column) for row in range(3) for column in range(5)]
    mean = (
        sum(((a - c) ** 2 + (b - d) ** 2) ** 0.5 for a, b in places for c, d in places) / tokens**2
    )
    torch.testing.assert_close(everywhere.distance, torch.full((2,), mean))
    assert everywhere.uniform == pytest.approx(mean) == itself.uniform
    torch.testing.assert_close(everywhere.maps, torch.full((2, 2, 3, 5), 1 / tokens))


def test_more_tokens_than_are_measured_at_once_change_nothing():
    q, k = random(1, 2, 256, 8), random(1, 2, 256, 8, name="keys")
    places = torch.cartesian_prod(torch.arange(16.0), torch.arange(16.0))
    whole = (attention_weights(q, k).mean(1) * torch.cdist(places, places)).sum(2).mean(1)
    torch.testing.assert_close(attention_maps(q, k, 16, 16).distance, whole)


@pytest.mark.parametrize(
    ("tokens", "height", "width"), [(65, 16, 16), (32, 16, 16), (300, 16, 16), (18, 12, 6)]
)
def test_tokens_that_are_no_squares_are_left_alone(tokens, height, width):
    q = random(1, 1, tokens, 4)
    assert (attention_maps(q, q, height, width) is None) == (tokens != 18)


def held_out(n=3):
    pixels = torch.randint(
        256, (n, 3, SIZE, SIZE), generator=generator("pixels"), dtype=torch.uint8
    )
    return ImageSet(pixels, torch.arange(n) % 3, torch.empty(n, 0), {})


def denoising(network):
    return Denoising(Denoiser(network, RectifiedFlow(), Velocity(), num_classes=3))


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_section_for_networks_with_attention(kind, tmp_path):
    network = awake(NETWORKS[kind]())
    report = Report(tmp_path, "attention")
    attention_section(report, denoising(network), held_out())
    names = {f"layer {i} of 4" for i in (1, 2, 4)}
    numbers = report.numbers["attention"]
    assert numbers.keys() == {"noise", "uniform", *names}
    assert numbers["noise"] == list(LEVELS)
    uniform = numbers["uniform"]
    assert set(uniform) == names
    assert all(0 < d < 1.5 * uniform[name] for name in names for d in numbers[name])
    assert (
        len({d for name in names for d in numbers[name]}) == 15
    )  # each of a level and a layer of its own
    assert "## Attention" in report.blocks
    with Image.open(tmp_path / "attention.png") as picture:
        assert len(picture.convert("RGB").getcolors(2**24)) > 1000
        assert picture.width > 8 * 96
        assert picture.height > 10 * 96
    assert not any(module._forward_pre_hooks for module in network.modules())


@pytest.mark.parametrize("kind", NETWORKS)
def test_looking_changes_nothing_and_sees_what_the_layer_computes(kind):
    network, real = awake(NETWORKS[kind]()), held_out()
    found = [module for module in network.modules() if isinstance(module, Attends)]
    x, t = scaled(real.pixels), torch.full((3,), 0.4)
    before = network(x, t, real.labels)
    with record_attention(found, SIZE, SIZE) as looks:
        assert torch.equal(network(x, t, real.labels), before)
    assert len(looks) == len(found) == 4
    for one in looks:
        assert one.maps.shape == (3, 2, 8, 8)
        torch.testing.assert_close(one.maps.sum((2, 3)), torch.ones(3, 2))


class Stranger(nn.Module):
    def forward(self, x, t, label=None):
        return 0 * x


class Registers(nn.Module):
    """Attention of ours, over tokens of which one is no part of the image."""

    def __init__(self):
        super().__init__()
        self.attention = unet.Attention(4, head_dim=4)

    def forward(self, x, t, label=None):
        self.attention(torch.ones(len(x), 4, 1, 65))
        return 0 * x


@pytest.mark.parametrize("network", [Stranger(), Registers()], ids=["stranger", "registers"])
def test_no_section_for_other_networks(network, tmp_path):
    report = Report(tmp_path, "attention")
    attention_section(report, denoising(network), held_out())
    assert report.blocks == []
    assert report.numbers == {}
    assert list(tmp_path.iterdir()) == []
