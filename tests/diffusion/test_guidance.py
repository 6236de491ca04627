"""Guidance: its algebra, its cost, what it refuses, and that it moves pictures as it should."""

import pytest
import torch
from gaussian import SCHEDULES, S
from torch import nn

from sturdy.diffusion import X0, Cosine, Denoiser, Guided, Heun, RectifiedFlow, V, sample

T = torch.tensor([0.1, 0.4, 0.7, 1.0])
X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABEL = torch.tensor([0, 1, 2, 3])  # 3 is the null label
NOISE = torch.randn(16, 1, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Tinted(nn.Module):
    """A backbone whose answer is its label's colour; it notes how many pictures it was asked
    about.
    """

    def __init__(self, num_classes):
        super().__init__()
        self.colour = nn.Embedding(num_classes + 1, 3)
        self.asked = []

    def forward(self, x, t, label):
        self.asked.append(len(x))
        shift = 0 if label is None else self.colour(label)[:, :, None, None]
        return 0.5 * x + t[:, None, None, None] + shift


@pytest.fixture
def denoiser():
    torch.manual_seed(0)
    return Denoiser(Tinted(3), Cosine(), V(), num_classes=3)


@pytest.fixture
def guide():
    torch.manual_seed(1)
    return Denoiser(Tinted(3), Cosine(), X0(), num_classes=3)  # another target is no obstacle


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.5, 1.0, 2.0, 7.5])
def test_guidance_is_a_line_from_null_to_label(denoiser, scale):
    null, conditional = denoiser(X, T), denoiser(X, T, LABEL)
    guided = Guided(denoiser, scale)(X, T, LABEL)
    assert torch.allclose(guided, (1 - scale) * null + scale * conditional, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("label", [None, LABEL])
def test_autoguidance_is_a_line_from_the_guide(denoiser, guide, scale, label):
    expected = (1 - scale) * guide(X, T, label) + scale * denoiser(X, T, label)
    assert torch.allclose(Guided(denoiser, scale, guide=guide)(X, T, label), expected, atol=1e-5)


@pytest.mark.parametrize(("scale", "rows"), [(1, 4), (0, 4), (2, 8)])
def test_guidance_costs_one_call(denoiser, scale, rows):
    Guided(denoiser, scale)(X, T, LABEL)
    assert denoiser.backbone.asked == [rows]


def test_guidance_at_its_ends_is_exact(denoiser):
    assert torch.equal(Guided(denoiser, 1)(X, T, LABEL), denoiser(X, T, LABEL))
    assert torch.equal(Guided(denoiser, 0)(X, T, LABEL), denoiser(X, T))
    assert torch.equal(Guided(denoiser, 5)(X, T), denoiser(X, T))


def test_guidance_in_x0_is_guidance_of_the_noise(denoiser):
    """Ho & Salimans write it for eps; (x - alpha x_0) / sigma of the guided x_0 must agree."""
    alpha, sigma = (c[:, None, None, None] for c in denoiser.schedule(T))

    def noise(x0):
        return (X - alpha * x0) / sigma

    w = 2.0
    paper = (1 + w) * noise(denoiser(X, T, LABEL)) - w * noise(denoiser(X, T))
    assert torch.allclose(noise(Guided(denoiser, 1 + w)(X, T, LABEL)), paper, atol=1e-4)


def test_outside_the_interval_there_is_no_guidance(denoiser):
    plain, everywhere = denoiser(X, T, LABEL), Guided(denoiser, 3.0)(X, T, LABEL)
    guided = Guided(denoiser, 3.0, interval=(0.3, 0.7))(X, T, LABEL)
    assert torch.equal(guided[[0, 3]], plain[[0, 3]])
    assert torch.equal(guided[[1, 2]], everywhere[[1, 2]])


@pytest.mark.parametrize(("t", "rows"), [(0.2, 4), (0.5, 8), (0.9, 4)])
def test_outside_the_interval_a_call_costs_a_plain_one(denoiser, t, rows):
    Guided(denoiser, 3.0, interval=(0.3, 0.7))(X, torch.full((4,), t), LABEL)
    assert denoiser.backbone.asked == [rows]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("with_guide", [False, True])
def test_rescale_gives_the_contrast_back(denoiser, guide, share, with_guide):
    """Lin et al. 2024, eqs. 15 and 16."""
    guide = guide if with_guide else None
    plain, guided = denoiser(X, T, LABEL), Guided(denoiser, 6.0, guide=guide)(X, T, LABEL)
    rescaled = Guided(denoiser, 6.0, guide=guide, rescale=share)(X, T, LABEL)

    def std(x):
        return x.flatten(1).std(1)

    assert torch.allclose(std(rescaled), share * std(plain) + (1 - share) * std(guided), rtol=1e-4)
    assert not torch.allclose(std(guided), std(plain), rtol=0.05)


def test_rescale_equals_diffusers(denoiser):
    pipeline = pytest.importorskip("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion")
    plain, guided = denoiser(X, T, LABEL), Guided(denoiser, 6.0)(X, T, LABEL)
    theirs = pipeline.rescale_noise_cfg(guided, plain, guidance_rescale=0.7)
    assert torch.allclose(Guided(denoiser, 6.0, rescale=0.7)(X, T, LABEL), theirs, atol=1e-5)


def test_guidance_without_classes_is_refused_but_by_a_guide():
    denoiser = Denoiser(Tinted(0), Cosine(), V())
    with pytest.raises(
        ValueError, match=r"scale=2 needs labels, but num_classes=0; set scale=1 or a guide"
    ):
        Guided(denoiser, 2)
    assert torch.equal(Guided(denoiser, 1)(X, T), denoiser(X, T))
    guide = Denoiser(Tinted(0), Cosine(), X0())
    assert torch.allclose(
        Guided(denoiser, 2, guide=guide)(X, T), 2 * denoiser(X, T) - guide(X, T), atol=1e-5
    )


def test_a_guide_that_means_something_else_is_refused(denoiser):
    with pytest.raises(ValueError, match="trained on another schedule"):
        Guided(denoiser, 2, guide=Denoiser(Tinted(3), RectifiedFlow(), V(), num_classes=3))
    with pytest.raises(ValueError, match="the guide knows 2 classes and the denoiser 3"):
        Guided(denoiser, 2, guide=Denoiser(Tinted(2), Cosine(), V(), num_classes=2))
    Guided(denoiser, 2, guide=Denoiser(Tinted(0), Cosine(), V()))


@pytest.mark.parametrize("interval", [(0.5, 0.5), (-0.1, 0.5), (0.5, 1.1), (0.7, 0.3)])
def test_an_impossible_interval_is_refused(denoiser, interval):
    with pytest.raises(ValueError, match=r"interval=\[.*\] must be two rising times"):
        Guided(denoiser, 2, interval=interval)


@pytest.mark.parametrize("rescale", [-0.1, 1.1])
def test_an_impossible_rescale_is_refused(denoiser, rescale):
    with pytest.raises(ValueError, match=rf"rescale={rescale} is no share"):
        Guided(denoiser, 2, rescale=rescale)


class Shifted(nn.Module):
    """Gaussians around 0.3 (label 0), -0.3 (label 1) and 0 (null), as wide as ``s``."""

    def __init__(self, s=S):
        super().__init__()
        self.s = s

    def forward(self, x, t, label):
        alpha, sigma = (c[:, None, None, None] for c in SCHEDULES["cosine"](t))
        mu = torch.tensor([0.3, -0.3, 0.0], dtype=x.dtype)[label][:, None, None, None]
        return (alpha * self.s**2 * x + sigma**2 * mu) / (alpha**2 * self.s**2 + sigma**2)


def drawn(scale, **options):
    denoiser, label = (
        Denoiser(Shifted(), SCHEDULES["cosine"], X0(), num_classes=2),
        torch.arange(16) % 2,
    )
    return sample(Heun(20), Guided(denoiser, scale, **options), NOISE, label, clip=None), label


def test_guidance_moves_samples_towards_the_label():
    def gap(scale, **options):
        x, label = drawn(scale, **options)
        return (x[label == 0].mean() - x[label == 1].mean()).item()

    assert gap(0) == pytest.approx(0, abs=0.02)
    assert gap(1) == pytest.approx(0.6, abs=0.03)
    assert gap(2) == pytest.approx(1.2, abs=0.06)
    assert gap(1) < gap(2, interval=(0.3, 0.6)) < gap(2)


def test_autoguidance_sharpens_around_the_label():
    """A guide that is right about the mean and too wide: the mean stays, and the spread shrinks."""
    guide = Denoiser(Shifted(2 * S), SCHEDULES["cosine"], X0(), num_classes=2)
    plain, label = drawn(1)
    guided, _ = drawn(2, guide=guide)
    assert guided[label == 0].mean().item() == pytest.approx(0.3, abs=0.02)
    assert plain[label == 0].std().item() == pytest.approx(S, rel=0.05)
    assert guided[label == 0].std() < 0.8 * S
