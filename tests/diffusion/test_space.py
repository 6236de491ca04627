"""A space decides the shape of x_0, how images become x_0 and back, and the range of samples."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from exact_resume.randomness import Draws
from sturdy.diffusion import DDIM, Denoiser, Heun, Pixels, RectifiedFlow, Space, Velocity, sample
from sturdy.diffusion.editing import image_to_image, inpaint


class Squares(Space):
    """Latents without a network: each 2 x 2 square is a position of 12 channels, three times as
    large, and the batch's noise is added.
    """

    clip = None

    def shape(self, size):
        return 12, size // 2, size // 2

    def encode(self, image, draws):
        noise = draws.normal("latent", self.shape(image.shape[-1]))
        return 3 * F.pixel_unshuffle(image, 2) + 0.01 * noise

    def decode(self, x0):
        return F.pixel_shuffle(x0 / 3, 2)

    def key(self):
        return "squares"


class Large(nn.Module):
    """Says under rectified flow that x_0 is 3 everywhere."""

    def forward(self, x, t, label):
        return (x - 3) / t[:, None, None, None]


@pytest.mark.parametrize("space", [Pixels(), Squares()])
def test_decoding_undoes_encoding(space):
    image = torch.rand(4, 3, 8, 8) * 2 - 1
    x0 = space.encode(image, Draws(0, range(4)))
    assert x0.shape == (4, *space.shape(8))
    assert torch.allclose(space.decode(x0), image, atol=0.03)


def test_pixels_are_the_images_themselves():
    image = torch.rand(2, 3, 8, 8)
    assert Pixels().encode(image, Draws(0, range(2))) is image
    assert Pixels(channels=1).shape(16) == (1, 16, 16)
    assert Pixels(channels=1).shape_of(16, 24) == (1, 16, 24)
    assert Pixels().key() == ""


@pytest.mark.parametrize("sampler", [DDIM(4), Heun(4)])
def test_samples_keep_to_the_range_of_the_space(sampler):
    denoiser = Denoiser(Large(), RectifiedFlow(), Velocity())
    noise, draws = torch.randn(2, 12, 4, 4), Draws(0, range(2))
    for space, largest in ((Pixels(), 1.0), (Squares(), 3.0)):
        walks = [
            sample(sampler, denoiser, noise, draws=draws, clip=space.clip),
            inpaint(sampler, denoiser, noise, noise, torch.ones(1), draws=draws, clip=space.clip),
            image_to_image(sampler, denoiser, noise, noise, 0.9, draws=draws, clip=space.clip),
        ]
        for x0 in walks:
            assert torch.allclose(x0, torch.full_like(x0, largest), atol=1e-4)
