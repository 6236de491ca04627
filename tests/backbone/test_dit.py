import pytest
import torch
from tiny import awake, dit
from torch.nn import functional as F

from sturdy.backbone.dit import Attention, Block, rotate, rotation

ROWS, COLUMNS, DIM = 5, 7, 16


def turn(rows=ROWS, columns=COLUMNS, dtype=torch.float64):
    return rotation(rows, columns, DIM, like=torch.empty(0, dtype=dtype))


def everywhere(vector):
    """One vector at every token, turned as there: ``(rows, columns, head_dim)``."""
    return rotate(vector.expand(1, ROWS * COLUMNS, 1, 1, DIM), turn()).reshape(ROWS, COLUMNS, DIM)


def test_rotation_is_complex_multiplication():
    torch.manual_seed(0)
    x = torch.randn(2, ROWS * COLUMNS, 3, 4, DIM, dtype=torch.float64)
    y = rotate(x, turn())
    for token in range(ROWS * COLUMNS):
        row, column = divmod(token, COLUMNS)
        for i in range(DIM // 2):
            place = row if i < DIM // 4 else column
            angle = torch.tensor(
                place * 100.0 ** -((i % (DIM // 4)) / (DIM // 4)), dtype=torch.float64
            )
            before = torch.complex(x[:, token, ..., i], x[:, token, ..., i + DIM // 2])
            after = torch.complex(y[:, token, ..., i], y[:, token, ..., i + DIM // 2])
            torch.testing.assert_close(after, before * torch.polar(torch.ones_like(angle), angle))


def test_products_depend_on_the_distance_only():
    torch.manual_seed(0)
    q, k = (
        everywhere(torch.randn(DIM, dtype=torch.float64)),
        everywhere(torch.randn(DIM, dtype=torch.float64)),
    )
    product = torch.einsum("hwc,ijc->hwij", q, k)
    torch.testing.assert_close(
        product[:-1, :-1, :-1, :-1], product[1:, 1:, 1:, 1:]
    )  # both a row and a column on
    torch.testing.assert_close(product[:-2, :, :-2, :], product[2:, :, 2:, :])
    assert not torch.allclose(product[:-1], product[1:])  # one of them alone
    assert not torch.allclose(product[0, 0, 0, 1], product[0, 0, 1, 0])  # a row is not a column


def test_rotation_keeps_lengths_and_starts_at_rest():
    torch.manual_seed(0)
    x = torch.randn(1, ROWS * COLUMNS, 1, 1, DIM, dtype=torch.float64)
    y = rotate(x, turn())
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(y[:, 0], x[:, 0])


def test_larger_grids_extend_smaller_ones():
    small = turn(3, 4).reshape(2, 3, 4, -1)
    assert torch.equal(turn().reshape(2, ROWS, COLUMNS, -1)[:, :3, :4], small)


def test_attention_is_the_softmax_formula():
    torch.manual_seed(0)
    attention = Attention(2 * DIM, heads=2).double()
    x = torch.randn(3, ROWS * COLUMNS, 2 * DIM, dtype=torch.float64)
    mixed = []
    for head in range(2):
        part = slice(head * DIM, (head + 1) * DIM)
        q, k, v = (
            x @ weight[part].T + bias[part]
            for weight, bias in zip(
                attention.qkv.weight.chunk(3), attention.qkv.bias.chunk(3), strict=True
            )
        )
        q, k = (z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt() for z in (q, k))
        q, k = (rotate(z[:, :, None, None], turn())[:, :, 0, 0] for z in (q, k))
        mixed.append(torch.softmax(q @ k.transpose(1, 2) / DIM**0.5, dim=2) @ v)
    torch.testing.assert_close(attention(x, turn()), attention.out(torch.cat(mixed, dim=2)))


def test_attention_without_positions_would_not_know_them():
    """Permuting the tokens permutes the result; only the rotation tells them apart."""
    torch.manual_seed(0)
    attention = Attention(2 * DIM, heads=2).double()
    x = torch.randn(1, ROWS * COLUMNS, 2 * DIM, dtype=torch.float64)
    order = torch.randperm(ROWS * COLUMNS)
    still = torch.stack([torch.ones_like(turn()[0]), torch.zeros_like(turn()[1])])
    torch.testing.assert_close(attention(x[:, order], still), attention(x, still)[:, order])
    assert not torch.allclose(attention(x[:, order], turn()), attention(x, turn())[:, order])


def test_block_starts_as_identity():
    torch.manual_seed(0)
    x, c = torch.randn(2, ROWS * COLUMNS, 2 * DIM), torch.randn(2, 2 * DIM)
    block = Block(2 * DIM, heads=2, dropout=0.5)
    assert torch.equal(block(x, c, turn(dtype=x.dtype)), x)
    assert not torch.equal(awake(block)(x, c, turn(dtype=x.dtype)), x)


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_patches_come_back_where_they_were(patch):
    """With the blocks asleep a pixel changes its own patch, and no other."""
    torch.manual_seed(0)
    backbone = dit(patch=patch, depth=0).eval()
    awake(backbone)
    x, t = torch.randn(1, 3, 8, 12), torch.rand(1)
    moved = x.clone()
    moved[0, :, 5, 6] += 1
    changed = (backbone(x, t) != backbone(moved, t)).any(1)[0]
    top, left = 5 // patch * patch, 6 // patch * patch
    expected = torch.zeros(8, 12, dtype=torch.bool)
    expected[top : top + patch, left : left + patch] = True
    assert torch.equal(changed, expected)


def test_tokens_know_where_they_are():
    """Rotary positions alone cannot: from patches that are all alike they make patches that are all
    alike.
    """
    torch.manual_seed(0)
    backbone = awake(dit(patch=2)).double().eval()
    x, t = torch.full((1, 3, 8, 12), 0.3, dtype=torch.float64), torch.rand(1, dtype=torch.float64)

    def spread() -> float:
        patches = F.pixel_unshuffle(backbone(x, t), 2).flatten(2)
        return (patches - patches[..., :1]).abs().amax().item()

    assert spread() > 0.01
    for parameter in backbone.pos_embed.parameters():
        parameter.data.zero_()
    assert spread() < 1e-9


def test_size_that_does_not_divide():
    with pytest.raises(ValueError, match=r"a multiple of patch=4, not 10 x 8"):
        dit(patch=4)(torch.randn(2, 3, 10, 8), torch.rand(2))


def test_width_that_does_not_divide():
    with pytest.raises(ValueError, match=r"width=20 must be a multiple of 4 \* heads = 8"):
        dit(width=20)
