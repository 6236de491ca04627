import pytest
import torch
from tiny import awake, unet

from sturdy.backbone.unet import Attention, Block, Down, Norm, Up


@pytest.mark.parametrize(("h", "w"), [(9, 8), (8, 10), (3, 3)])
def test_size_that_does_not_halve(h, w):
    backbone = unet(multipliers=(1, 1, 2), attention=(False, False, False))
    with pytest.raises(ValueError, match=rf"{h} x {w} .* data\.image_size a multiple of 4"):
        backbone(torch.randn(2, 3, h, w), torch.rand(2))


def test_attention_by_level_must_fit():
    with pytest.raises(ValueError, match=r"backbone\.attention has 2 entries for 3 levels"):
        unet(multipliers=(1, 1, 2))


def test_head_must_divide():
    with pytest.raises(ValueError, match=r"backbone\.head_dim=12 does not divide the 16 channels"):
        unet(head_dim=12)


def test_width_must_be_a_multiple_of_four():
    with pytest.raises(ValueError, match=r"backbone\.width=10"):
        unet(width=10)


def test_attention_is_at_the_levels_that_ask():
    backbone = unet(multipliers=(1, 2), attention=(True, False))
    where = {name.rsplit(".", 1)[0] for name, module in backbone.named_modules() if isinstance(module, Attention)}
    assert where == {"encoder.0", "middle.0", "decoder.1.0", "decoder.1.1"}


def test_attention_is_the_softmax_formula():
    torch.manual_seed(0)
    attention = awake(Attention(16, head_dim=8)).double()
    x = torch.randn(2, 16, 3, 5, dtype=torch.float64)
    tokens = attention.norm(x).flatten(2).transpose(1, 2)
    mixed = []
    q, k, v = (
        tokens @ w.T + b for w, b in zip(attention.qkv.weight.chunk(3), attention.qkv.bias.chunk(3), strict=True)
    )
    for head in (slice(0, 8), slice(8, 16)):
        weights = torch.softmax(torch.einsum("bic,bjc->bij", q[..., head], k[..., head]) / 8**0.5, dim=2)
        mixed.append(weights @ v[..., head])
    expected = x + attention.out(torch.cat(mixed, dim=2)).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(attention(x), expected)


def test_norm_is_the_group_formula():
    torch.manual_seed(0)
    norm = Norm(48).double()
    x = torch.randn(2, 48, 3, 5, dtype=torch.float64) * 3 + 1
    groups = x.reshape(2, norm.num_groups, -1)
    variance, mean = torch.var_mean(groups, dim=2, correction=0, keepdim=True)
    torch.testing.assert_close(norm(x), ((groups - mean) / (variance + norm.eps).sqrt()).reshape(x.shape))
    assert norm.num_groups == 4


@pytest.mark.parametrize("channels", range(4, 260, 4))
def test_groups_hold_at_least_four_channels(channels):
    groups = Norm(channels).num_groups
    assert channels % groups == 0
    assert channels // groups >= 4


def test_down_undoes_up():
    x = torch.randn(2, 3, 4, 6)
    assert torch.equal(Down()(Up()(x)), x)
    assert torch.equal(Up()(x), x.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_block_starts_as_its_skip():
    torch.manual_seed(0)
    x, c = torch.randn(2, 8, 4, 4), torch.randn(2, 16)
    same = Block(8, 8, 16, dropout=0.5)
    assert torch.equal(same(x, c), x)
    wider = Block(8, 12, 16, dropout=0.5, resample=Down())
    assert torch.equal(wider(x, c), wider.skip(Down()(x)))
    assert not torch.equal(awake(same)(x, c), x)
