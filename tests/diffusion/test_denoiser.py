"""The denoiser's labels, its state and precision, and the algebra of guidance."""

import pytest
import torch
from torch import nn

from sturdy.diffusion import X0, Cosine, Denoiser, Guided, V

T = torch.tensor([0.1, 0.4, 0.7, 1.0])
X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABEL = torch.tensor([0, 1, 2, 3])  # 3 is the null label


class Tinted(nn.Module):
    """A backbone whose answer is its label's colour; it notes what it was asked."""

    def __init__(self, num_classes):
        super().__init__()
        self.colour = nn.Embedding(num_classes + 1, 3)
        self.asked = []

    def forward(self, x, t, label):
        self.asked.append((len(x), label))
        shift = 0 if label is None else self.colour(label)[:, :, None, None]
        return 0.5 * x + t[:, None, None, None] + shift


@pytest.fixture
def denoiser():
    torch.manual_seed(0)
    return Denoiser(Tinted(3), Cosine(), V(), num_classes=3)


def test_state_is_the_backbones_alone(denoiser):
    assert list(denoiser.state_dict()) == ["backbone.colour.weight"]


def test_estimate_is_the_target_undone(denoiser):
    alpha, sigma = (c[:, None, None, None] for c in denoiser.schedule(T))
    v = denoiser.predict(X, T, LABEL)
    assert torch.allclose(denoiser(X, T, LABEL), alpha * X - sigma * v, atol=1e-6)


def test_no_label_means_the_null_label(denoiser):
    assert torch.equal(denoiser(X, T), denoiser(X, T, torch.full((4,), 3)))
    assert not torch.equal(denoiser(X, T), denoiser(X, T, torch.full((4,), 2)))


def test_without_classes_labels_are_ignored():
    denoiser = Denoiser(Tinted(0), Cosine(), V())
    assert torch.equal(denoiser(X, T, LABEL), denoiser(X, T))
    assert [label for _, label in denoiser.backbone.asked] == [None, None]


@pytest.mark.parametrize("wrong", [4, -1, 1000])
def test_a_label_out_of_range_is_named(denoiser, wrong):
    with pytest.raises(ValueError, match=rf"label {wrong} is out of range: with num_classes=3 .* 0 to 2"):
        denoiser(X, T, torch.tensor([0, wrong, 1, 2]))
    assert not denoiser.backbone.asked


def test_labels_elsewhere_are_not_read_back(denoiser):
    """A meta tensor, like one on a GPU, is not to be looked into; it has no values, so a look would raise."""
    x, t, label = (z.to("meta") for z in (X, T, LABEL))
    assert denoiser.to("meta").predict(x, t, label).shape == X.shape
    with pytest.raises(RuntimeError):
        label[label > 3].numel()  # the look


def test_a_label_of_another_shape_is_refused(denoiser):
    with pytest.raises(ValueError, match=r"label has shape \(1,\); 4 images need \(4,\)"):
        denoiser(X, T, LABEL[:1])


def test_a_backbone_that_changes_the_shape_is_refused():
    """A single channel would otherwise broadcast through the loss unnoticed."""

    class Grey(nn.Module):
        def forward(self, x, t, label):
            return x.mean(1, keepdim=True)

    with pytest.raises(ValueError, match=r"turned \(4, 3, 8, 8\) into \(4, 1, 8, 8\)"):
        Denoiser(Grey(), Cosine(), X0())(X, T)


def test_prediction_is_float32_under_autocast():
    class Conv(nn.Conv2d):
        def forward(self, x, t, label):
            return super().forward(x)

    denoiser = Denoiser(Conv(3, 3, 3, padding=1), Cosine(), V())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert denoiser.backbone(X, T, None).dtype == torch.bfloat16
        assert denoiser.predict(X, T).dtype == denoiser(X, T).dtype == torch.float32


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.5, 1.0, 2.0, 7.5])
def test_guidance_is_a_line_from_null_to_label(denoiser, scale):
    null, conditional = denoiser(X, T), denoiser(X, T, LABEL)
    guided = Guided(denoiser, scale)(X, T, LABEL)
    assert torch.allclose(guided, (1 - scale) * null + scale * conditional, atol=1e-5)


@pytest.mark.parametrize(("scale", "rows"), [(1, 4), (0, 4), (2, 8)])
def test_guidance_costs_one_call(denoiser, scale, rows):
    Guided(denoiser, scale)(X, T, LABEL)
    assert [asked for asked, _ in denoiser.backbone.asked] == [rows]


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


def test_guidance_without_classes_is_refused():
    denoiser = Denoiser(Tinted(0), Cosine(), V())
    with pytest.raises(ValueError, match=r"scale=2 needs labels, but num_classes=0; set scale=1"):
        Guided(denoiser, 2)
    assert torch.equal(Guided(denoiser, 1)(X, T), denoiser(X, T))
