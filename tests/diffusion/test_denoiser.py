"""The denoiser's labels, its state and precision, and what it hands to its backbone."""

import pytest
import torch
from torch import nn

from sturdy.diffusion import X0, Cosine, Denoiser, Preconditioned, V, VarianceExploding

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
    with pytest.raises(
        ValueError, match=rf"label {wrong} is out of range: with num_classes=3 .* 0 to 2"
    ):
        denoiser(X, T, torch.tensor([0, wrong, 1, 2]))
    assert not denoiser.backbone.asked


def test_labels_elsewhere_are_not_read_back(denoiser):
    """A meta tensor, like one on a GPU, is not to be looked into; it has no values, so a look would
    raise.
    """
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


class Listening(nn.Module):
    """A backbone that says zero and keeps what it was handed."""

    def forward(self, x, t, label):
        self.heard = x, t
        return torch.zeros_like(x)


def test_a_backbone_is_handed_x_and_t_themselves():
    denoiser = Denoiser(Listening(), Cosine(), V())
    denoiser(X, T)
    assert denoiser.backbone.heard[0] is X
    assert denoiser.backbone.heard[1] is T


@pytest.mark.parametrize("t", [0.0, 2.0**-24, 0.3, 1.0])
def test_a_preconditioned_backbone_is_handed_unit_variance_and_a_finite_noise_level(t):
    """With s = 0.5: x of variance s^2 + sigma^2 over its size, and log(sigma) / 4; and D is c_skip
    x.
    """
    schedule, t = VarianceExploding(), torch.full((4,), t)
    sigma = schedule(t)[1][0].item()
    denoiser = Denoiser(Listening(), schedule, Preconditioned(sigma_data=0.5))
    x0 = denoiser(X, t)
    x, c_noise = denoiser.backbone.heard
    assert torch.allclose(x, X / (0.25 + sigma**2) ** 0.5)
    assert torch.allclose(x0, X * 0.25 / (0.25 + sigma**2))
    assert c_noise.isfinite().all()
    if sigma:
        assert c_noise[0].item() == pytest.approx(torch.tensor(sigma).log().item() / 4, abs=1e-5)
