"""What holds for every backbone."""

import copy

import pytest
import torch
from tiny import awake, dit, unet

from sturdy.backbone import DiT, UNet

pytestmark = pytest.mark.parametrize("make", [unet, dit])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def batch(b=3, c=3, h=8, w=8, dtype=torch.float32):
    rng = torch.Generator().manual_seed(2)
    return (
        torch.randn(b, c, h, w, generator=rng, dtype=dtype),
        torch.rand(b, generator=rng, dtype=dtype),
        torch.randint(3, (b,), generator=rng),
    )


def gradients(backbone, x, t, label, seed=5):
    """A loss and its gradients under one state of the default generator, from which dropout
    draws.
    """
    backbone.zero_grad()
    torch.manual_seed(seed)
    loss = (backbone(x, t, label) - x).square().mean()
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in backbone.parameters())]


@pytest.mark.parametrize(
    ("b", "c", "h", "w"), [(1, 3, 8, 8), (3, 1, 16, 16), (2, 4, 8, 12), (5, 3, 2, 6)]
)
def test_shape_is_kept(make, b, c, h, w):
    backbone = awake(make(image_channels=c))
    x, t, _ = batch(b, c, h, w)
    y = backbone(x, t)
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    assert y.isfinite().all()
    assert y.std() > 0


def test_one_backbone_takes_many_sizes(make):
    backbone = awake(make())
    for size in (4, 8, 32):
        x, t, _ = batch(2, 3, size, size)
        assert backbone(x, t).shape == x.shape


def test_starts_at_zero_and_can_leave_it(make):
    backbone = make(num_classes=3)
    x, t, label = batch()
    y = backbone(x, t, label)
    assert not y.any()
    (y - x).square().mean().backward()
    last = backbone.out[-1] if isinstance(backbone, UNet) else backbone.out
    assert last.weight.grad.any()
    assert last.bias.grad.any()


def test_everything_wakes_within_a_few_steps(make):
    """Then every parameter has a gradient, and time and label matter."""
    backbone = make(num_classes=3)
    x, t, label = batch()
    for _ in range(4):  # the output wakes first, then the branches, then what modulates them
        _, *slopes = gradients(backbone, x, t, label)
        with torch.no_grad():
            for parameter, slope in zip(backbone.parameters(), slopes, strict=True):
                parameter -= 1e-2 * slope.sign()
    assert all(slope.any() for slope in slopes)
    backbone.eval()
    y = backbone(x, t, label)
    assert not torch.allclose(y, backbone(x, 1 - t, label), atol=1e-4)
    assert not torch.allclose(y, backbone(x, t, (label + 1) % 3), atol=1e-4)


def test_no_label_is_the_null_label(make):
    backbone = awake(make(num_classes=3)).eval()
    x, t, label = batch()
    null = torch.full_like(label, 3)
    assert torch.equal(backbone(x, t), backbone(x, t, null))
    assert not torch.equal(backbone(x, t), backbone(x, t, label))
    assert backbone.condition.label.weight.shape[0] == 4


def test_labels_are_ignored_without_classes(make):
    backbone = awake(make()).eval()
    x, t, label = batch()
    assert torch.equal(backbone(x, t), backbone(x, t, label + 99))


@pytest.mark.parametrize("wrong", [-1, 4])
def test_label_out_of_range(make, wrong):
    backbone = make(num_classes=3)
    x, t, label = batch()
    label[1] = wrong
    with pytest.raises(IndexError, match=r"not in \[0, 3\].*num_classes=3 must be"):
        backbone(x, t, label)


def test_each_image_is_on_its_own(make):
    """No image sees another: image 1 alone is image 1 in the batch, up to rounding."""
    backbone = awake(make(num_classes=3)).double().eval()
    x, t, label = batch(dtype=torch.float64)
    torch.testing.assert_close(backbone(x, t, label)[1:2], backbone(x[1:2], t[1:2], label[1:2]))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_changes_no_bit(make, dropout):
    plain = awake(make(num_classes=3, dropout=dropout))
    recomputed = make(num_classes=3, dropout=dropout, checkpoint=True)
    recomputed.load_state_dict(plain.state_dict())
    args = batch()
    expected = gradients(plain, *args)
    assert all(map(torch.equal, gradients(recomputed, *args), expected))
    other_seed = gradients(recomputed, *args, seed=6)
    assert all(map(torch.equal, other_seed, expected)) == (
        dropout == 0
    )  # the seed is dropout's, and nothing else's


def test_checkpointing_recomputes(make):
    """It keeps fewer activations for the backward pass."""
    kept = {}
    for checkpoint in (False, True):
        backbone, sizes = make(checkpoint=checkpoint), []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x
        )
        x, t, _ = batch()
        with hooks:
            backbone(x, t)
        kept[checkpoint] = sum(sizes)
    assert kept[True] < kept[False] / 2


def test_a_shard_is_a_function_of_its_seed(make):
    """What ran before, in another shape or mode, changes no bit; no kernel is refused as
    nondeterministic.
    """
    backbone = awake(make(num_classes=3, dropout=0.3))
    args = batch()
    torch.use_deterministic_algorithms(True)
    try:
        first = gradients(backbone, *args)
        gradients(backbone, *batch(5, 3, 16, 12), seed=7)
        backbone.eval()(*batch(1))
        assert all(map(torch.equal, gradients(backbone.train(), *args), first))
    finally:
        torch.use_deterministic_algorithms(False)


def test_state_is_parameters_only(make):
    backbone = make(num_classes=3)
    assert set(backbone.state_dict()) == {name for name, _ in backbone.named_parameters()}
    assert all(parameter.requires_grad for parameter in backbone.parameters())


def test_copy_computes_the_same(make):
    backbone = awake(make(num_classes=3)).eval()
    args = batch()
    assert torch.equal(copy.deepcopy(backbone)(*args), backbone(*args))


def test_gradient_is_the_slope(make):
    """Along a random direction of parameters and image, against a central difference in 64 bits."""
    backbone = awake(make(num_classes=3)).double().eval()
    x, t, label = batch(dtype=torch.float64)
    start = {name: p.detach().clone() for name, p in backbone.named_parameters()}
    direction = {name: torch.randn_like(p) for name, p in start.items()}
    across = torch.randn_like(x)

    def loss(step):
        moved = {name: p + step * direction[name] for name, p in start.items()}
        return (
            torch.func.functional_call(backbone, moved, (x + step * across, t, label))
            .square()
            .sum()
        )

    step = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(step), step)
    with torch.no_grad():
        difference = (loss(1e-5) - loss(-1e-5)) / 2e-5
    torch.testing.assert_close(slope, difference, rtol=1e-5, atol=0)


def test_bfloat16_autocast_is_close(make):
    backbone = awake(make(num_classes=3)).eval()
    args = batch()
    exact = backbone(*args)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = backbone(*args)
    assert rounded.dtype == exact.dtype
    assert not torch.equal(rounded, exact)
    assert (rounded - exact).norm() < 0.05 * exact.norm()


def test_channels_last_is_kept_and_equal(make):
    backbone = awake(make(num_classes=3)).eval()
    x, t, label = batch()
    expected = gradients(backbone, x, t, label)
    backbone = backbone.to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    assert backbone(x, t, label).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(gradients(backbone, x, t, label), expected, rtol=1e-3, atol=1e-5)


def test_learns_one_batch(make):
    """Noise of eight images, told apart by time, label and shape, is found to a twentieth of its
    variance.
    """
    backbone = make(num_classes=3, width=16, dropout=0.0)
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=1e-2)
    x, t, label = batch(8)
    noise = torch.randn(x.shape)
    angle = (t * torch.pi / 2)[:, None, None, None]
    x_t = angle.cos() * x + angle.sin() * noise
    for _ in range(50):
        optimizer.zero_grad()
        loss = (backbone(x_t, t, label) - noise).square().mean()
        loss.backward()
        optimizer.step()
    assert loss < 0.05


def test_wrong_number_of_channels(make):
    x, t, _ = batch(c=4)
    with pytest.raises(ValueError, match=r"4 channels, not image_channels=3"):
        make()(x, t)


def test_documented_sizes(make):
    """docs/concepts/backbones.md names these."""
    cls, parameters = {unet: (UNet, 7_662_979), dit: (DiT, 7_407_756)}[make]
    with torch.device("meta"):
        backbone = cls(num_classes=7)
    assert sum(parameter.numel() for parameter in backbone.parameters()) == parameters
