"""The small network is a function of images and questions, answers them, and gives features on one
scale.
"""

import pytest
import torch

from exact_resume.randomness import generator
from sturdy.encoders.images import scaled, unscaled
from sturdy.encoders.network import answer, embed, fit, nt_xent, view


def patches(n, seed):
    """Grey noise with a bright square: where it is and which colour it has are the questions."""
    rng = generator("patches", seed)
    pixels = torch.randint(60, 140, (n, 3, 16, 16), generator=rng, dtype=torch.uint8)
    side, colour = torch.randint(2, (n,), generator=rng), torch.randint(3, (n,), generator=rng)
    for i in range(n):
        pixels[i, colour[i], 5:11, slice(1, 7) if side[i] == 0 else slice(9, 15)] = 250
    return pixels, {"side": (side, 2), "colour": (colour, 3)}


def test_it_answers_what_it_was_trained_on_and_nothing_of_the_process_matters():
    pixels, questions = patches(300, 0)
    network = fit(pixels, questions, contrast=False, seen=300)
    torch.manual_seed(7)
    torch.randn(5)
    again = fit(pixels, questions, contrast=False, seen=300)
    assert all(
        torch.equal(a, b)
        for a, b in zip(network.state_dict().values(), again.state_dict().values(), strict=True)
    )
    other = fit(pixels, questions, contrast=False, seen=300, seed=1)
    assert not torch.equal(network.mean, other.mean)
    network = fit(pixels, questions, contrast=False, seen=2000)
    new, right = patches(200, 1)
    for name, answers in answer(network, new).items():
        assert (answers == right[name][0]).double().mean() > 0.95


@pytest.mark.parametrize("size", [8, 20, 48])
def test_features_of_any_size_have_one_scale(size):
    pixels = torch.randint(256, (64, 3, size, size), generator=generator("any"), dtype=torch.uint8)
    network = fit(pixels, {}, contrast=True, seen=128)
    features = embed(network, pixels, batch=10)
    assert features.shape == (64, 128)
    assert features.mean(0).abs().max() < 1e-4
    assert features.square().mean().item() == pytest.approx(1, rel=1e-4)


def test_contrast_tells_pictures_apart():
    z = torch.eye(4)
    assert nt_xent(z.repeat(2, 1)) < 0.1
    assert nt_xent(torch.cat([z, z.roll(1, 0)])) > 2
    coarse = torch.rand(200, 3, 4, 4, generator=generator("pictures"))
    pixels = (255 * torch.nn.functional.interpolate(coarse, size=16, mode="bilinear")).to(
        torch.uint8
    )
    views = [view(scaled(pixels), generator(name)) for name in ("one", "two")]
    losses = []
    for seen in (1, 2000):
        network = fit(pixels, {}, contrast=True, seen=seen)
        with torch.no_grad():
            losses.append(nt_xent(network.project(network.trunk(torch.cat(views)).relu())))
    assert losses[1] < losses[0] / 2


def test_grey_images_are_seen_as_rgb_and_others_refused():
    grey = torch.randint(0, 256, (6, 1, 8, 12), generator=torch.Generator().manual_seed(0))
    grey = grey.to(torch.uint8)
    networks = [fit(x, {}, contrast=True, seen=12) for x in (grey, grey.repeat(1, 3, 1, 1))]
    assert torch.equal(networks[0](grey), networks[1](grey.repeat(1, 3, 1, 1)))
    with pytest.raises(ValueError, match="images of 2 channels are neither grey nor RGB"):
        networks[0](grey.repeat(1, 2, 1, 1))


def test_float_images_become_pixels_and_pixels_stay():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(unscaled(scaled(levels)), levels)
    assert unscaled(levels) is levels
