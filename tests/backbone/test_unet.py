import pytest
import torch
from tiny import awake, unet

from sturdy.backbone.unet import Attention, Block, Down, Norm, Up


@pytest.mark.parametrize(("h", "w"), [(9, 8), (8, 10), (3, 3)])
def test_size_that_does_not_halve(h, w):
    backbone = unet(multipliers=(1, 1, 2), attention=(False, False, False))
    with pytest.raises(
        ValueError,
        match=rf"a multiple of 4, not {h} x {w}: .* fewer multipliers",
    ):
        backbone(torch.randn(2, 3, h, w), torch.rand(2))


def test_patches_ask_for_larger_multiples():
    with pytest.raises(ValueError, match=r"a multiple of 8, not 8 x 12: .* a smaller patch"):
        unet(patch=4)(torch.randn(2, 3, 8, 12), torch.rand(2))


@pytest.mark.parametrize("patch", [2, 4])
def test_patches_are_channels(patch):
    """It equals a U-Net on images whose squares of pixels were laid out as channels, here by
    hand.
    """
    torch.manual_seed(0)
    backbone = awake(unet(patch=patch)).eval()
    inner = unet(image_channels=3 * patch**2).eval()
    inner.load_state_dict(backbone.state_dict())
    x, t = torch.randn(2, 3, 16, 24), torch.rand(2)
    squares = x.reshape(2, 3, 16 // patch, patch, 24 // patch, patch)
    y = inner(squares.permute(0, 1, 3, 5, 2, 4).reshape(2, -1, 16 // patch, 24 // patch), t)
    y = (
        y.reshape(2, 3, patch, patch, 16 // patch, 24 // patch)
        .permute(0, 1, 4, 2, 5, 3)
        .reshape(x.shape)
    )
    assert torch.equal(backbone(x, t), y)


@pytest.mark.parametrize("patch", [1, 2])
def test_memory_format_is_kept(patch):
    backbone, t = awake(unet(patch=patch)), torch.rand(2)
    x = torch.randn(2, 3, 8, 8)
    assert backbone(x, t).is_contiguous()
    assert backbone(x.to(memory_format=torch.channels_last), t).is_contiguous(
        memory_format=torch.channels_last
    )


def test_attention_by_level_must_fit():
    with pytest.raises(ValueError, match=r"attention=\[.*\] must have 3 entries"):
        unet(multipliers=(1, 1, 2))


def test_head_must_divide():
    with pytest.raises(ValueError, match=r"head_dim=12 does not divide the 16 channels"):
        unet(head_dim=12)


def test_width_must_be_a_multiple_of_four():
    with pytest.raises(ValueError, match=r"width=10 must be a multiple of 4"):
        unet(width=10)


def test_attention_is_at_the_levels_that_ask():
    backbone = unet(multipliers=(1, 2), attention=(True, False))
    where = {
        name.rsplit(".", 1)[0]
        for name, module in backbone.named_modules()
        if isinstance(module, Attention)
    }
    assert where == {"encoder.0", "middle.0", "decoder.1.0", "decoder.1.1"}


def test_attention_is_the_softmax_formula():
    torch.manual_seed(0)
    attention = awake(Attention(16, head_dim=8)).double()
    x = torch.randn(2, 16, 3, 5, dtype=torch.float64)
    tokens = attention.norm(x).flatten(2).transpose(1, 2)
    mixed = []
    q, k, v = (
        tokens @ w.T + b
        for w, b in zip(attention.qkv.weight.chunk(3), attention.qkv.bias.chunk(3), strict=True)
    )
    for head in (slice(0, 8), slice(8, 16)):
        weights = torch.softmax(
            torch.einsum("bic,bjc->bij", q[..., head], k[..., head]) / 8**0.5, dim=2
        )
        mixed.append(weights @ v[..., head])
    expected = x + attention.out(torch.cat(mixed, dim=2)).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(attention(x), expected)


def test_norm_is_the_group_formula():
    torch.manual_seed(0)
    norm = Norm(48).double()
    x = torch.randn(2, 48, 3, 5, dtype=torch.float64) * 3 + 1
    groups = x.reshape(2, norm.num_groups, -1)
    variance, mean = torch.var_mean(groups, dim=2, correction=0, keepdim=True)
    torch.testing.assert_close(
        norm(x), ((groups - mean) / (variance + norm.eps).sqrt()).reshape(x.shape)
    )
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


# ours: theirs, of a U-Net with two levels, one block a level and attention at the second
PLACES = {
    "encoder.0": "down_blocks.0.resnets.0",
    "encoder.1": "down_blocks.0.downsamplers.0",
    "encoder.2": "down_blocks.1.resnets.0",
    "middle.0": "mid_block.resnets.0",
    "middle.1": "mid_block.resnets.1",
    "decoder.0.0": "up_blocks.0.resnets.0",
    "decoder.0.1": "up_blocks.0.resnets.1",
    "rise.0": "up_blocks.0.upsamplers.0",
    "decoder.1.0": "up_blocks.1.resnets.0",
    "decoder.1.1": "up_blocks.1.resnets.1",
    "condition.hidden": "time_embedding.linear_1",
    "condition.time": "time_embedding.linear_2",
    "condition.label": "class_embedding",
    "stem": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
PARTS = {"film": "time_emb_proj", "skip": "conv_shortcut"}


def as_diffusers(state):
    """Our parameters under diffusers' names."""
    theirs = {}
    for name, value in state.items():
        place = next(p for p in PLACES if name.startswith(p + "."))
        there, part = PLACES[place], name.removeprefix(place + ".")
        if part.startswith("attention."):
            there = there.replace("resnets", "attentions")
            _, layer, kind = part.split(".")
            names = {"norm": ["group_norm"], "qkv": ["to_q", "to_k", "to_v"], "out": ["to_out.0"]}[
                layer
            ]
            theirs |= {
                f"{there}.{n}.{kind}": v
                for n, v in zip(names, value.chunk(len(names)), strict=True)
            }
        else:
            layer, _, kind = part.rpartition(".")
            theirs[".".join(filter(None, [there, PARTS.get(layer, layer), kind]))] = value
    return theirs


def test_equals_diffusers_on_the_same_weights():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    ours = awake(
        unet(width=128, multipliers=(1, 1), head_dim=32, num_classes=3)
    ).eval()  # all norms have 32 groups
    theirs = diffusers.UNet2DModel(
        block_out_channels=(128, 128),
        layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
        attn_norm_num_groups=32,
        attention_head_dim=32,
        num_class_embeds=4,
    ).eval()
    theirs.load_state_dict(as_diffusers(ours.state_dict()))
    x, t, label = torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([0, 3])
    with torch.no_grad():
        torch.testing.assert_close(
            ours(x, t, label), theirs(x, 1000 * t, label).sample, rtol=0, atol=1e-3
        )
