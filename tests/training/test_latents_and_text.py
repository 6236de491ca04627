"""A latent space and a text condition are one class each: nothing else changes for them."""

import torch
from torch import nn
from torch.nn import functional as F

from exact_resume.randomness import Draws, reseed
from sturdy.diffusion import (
    Condition,
    Denoiser,
    Guided,
    Heun,
    Objective,
    RectifiedFlow,
    Space,
    Velocity,
    sample,
)
from sturdy.training.module import DiffusionModule
from tiny_module import batch, fit

CAPTIONS = 3
TABLE = torch.randn(CAPTIONS + 1, 5, 8, generator=torch.Generator().manual_seed(0))
EMPTY = TABLE[CAPTIONS]


class TextCondition(Condition):
    """The embeddings of a caption's tokens, ``(b, n, d)``; ``null`` ``(n, d)`` are those of the
    empty caption.
    """

    def __init__(self, tokens, null):
        super().__init__(tokens)
        self.null_tokens = null

    def drop(self, mask):
        (tokens,) = self.rows
        return self.with_rows(torch.where(mask[:, None, None], self.null_tokens, tokens))

    def arguments(self):
        return self.rows


def captions(label, num_captions, augmentation=None):
    """What ``make_condition`` is: labels are the numbers of captions, the last is the empty one."""
    return TextCondition(TABLE[label], TABLE[num_captions])


class Latents(Space):
    """Each 2 x 2 square is a position of 12 channels, larger than pixels and sampled with noise."""

    clip = None

    def shape(self, size):
        return 12, size // 2, size // 2

    def encode(self, image, draws):
        noise = draws.normal("latent", self.shape(image.shape[-1]))
        return 3 * F.pixel_unshuffle(image, 2) + 0.1 * noise

    def decode(self, x0):
        return F.pixel_shuffle(x0 / 3, 2)

    def key(self):
        return "squares"


class Reader(nn.Module):
    """A backbone of latents that attends to the tokens of a text."""

    def __init__(self):
        super().__init__()
        self.into = nn.Conv2d(12, 8, 1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Conv2d(8, 12, 1)
        self.seen = []

    def forward(self, x, t, tokens):
        self.seen.append(tokens)
        h = self.into(x) + t[:, None, None, None]
        queries = h.flatten(2).transpose(1, 2)
        read, _ = self.attention(queries, tokens, tokens)
        return self.out(h + read.transpose(1, 2).reshape(h.shape))


def make(label_drop=0.1):
    reseed("text")
    denoiser = Denoiser(Reader(), RectifiedFlow(), Velocity(), CAPTIONS, make_condition=captions)
    optimizer = torch.optim.AdamW
    objective = Objective(label_drop=label_drop)
    return DiffusionModule(denoiser, objective, space=Latents(), optimizer=optimizer, shards=2)


def test_it_trains_the_same_whenever_it_is_run(tmp_path):
    (a, x), (b, y) = ((m := make(), fit(m, tmp_path / str(i), steps=4)[1]) for i in range(2))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert [o["loss"] for o in x] == [o["loss"] for o in y]
    assert not torch.equal(a.denoiser.backbone.out.weight, make().denoiser.backbone.out.weight)


def test_dropped_captions_are_the_empty_one(tmp_path):
    for label_drop in (0.0, 1.0):
        module = make(label_drop)
        fit(module, tmp_path / str(label_drop), steps=1)
        tokens = torch.cat(module.denoiser.backbone.seen)
        expected = TABLE[batch(0)[1]] if label_drop == 0 else EMPTY.expand(8, -1, -1)
        assert torch.equal(tokens, expected)


def test_it_samples_with_guidance_by_label_or_by_condition(tmp_path):
    module = make()
    fit(module, tmp_path, steps=2)
    denoiser, space = module.ema.model, module.space
    x_t, t = torch.randn(2, *space.shape(8)), torch.tensor([0.3, 0.9])
    label = torch.tensor([0, 2])
    text = TextCondition(TABLE[label], EMPTY)
    plain, null = denoiser(x_t, t, text), denoiser(x_t, t, text.null())
    assert torch.equal(null, denoiser(x_t, t)), "no condition is the empty caption"
    assert not torch.allclose(plain, null)
    guided = Guided(denoiser, 3.0)
    for cond in (label, text):
        assert torch.allclose(guided(x_t, t, cond), null + 3 * (plain - null), atol=1e-4)

    noise, draws = torch.randn(2, *space.shape(8)), Draws(0, range(2))
    x0 = sample(Heun(4), guided, noise, text, draws, clip=space.clip)
    assert torch.equal(x0, sample(Heun(4), guided, noise, label, draws, clip=space.clip))
    assert space.decode(x0).shape == (2, 3, 8, 8)
