import math

import pytest
import torch
from torch import nn

from sturdy.backbone.embed import ConditionEmbedding, checkpointed_call, fourier, zero_init


def test_fourier_is_the_formula():
    t = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    features = fourier(t, 6)
    for row, time in zip(features, t.tolist(), strict=True):
        for i in range(3):
            angle = 1000 * time / 10_000 ** (i / 3)
            assert row[i].item() == pytest.approx(math.cos(angle), abs=1e-9)
            assert row[i + 3].item() == pytest.approx(math.sin(angle), abs=1e-9)


def test_fourier_agrees_with_diffusers():
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    t = torch.rand(7, dtype=torch.float32)
    theirs = embeddings.get_timestep_embedding(
        1000 * t, 32, flip_sin_to_cos=True, downscale_freq_shift=0
    )
    torch.testing.assert_close(fourier(t, 32), theirs, rtol=0, atol=1e-3)


def test_fourier_tells_neighbouring_times_apart_in_low_precision():
    t = torch.arange(1, 1001) / 1000
    features = fourier(t, 32).to(torch.bfloat16)
    assert len(features.unique(dim=0)) == 1000
    assert fourier(t.to(torch.bfloat16), 32).dtype == torch.float32


def test_odd_number_of_features():
    with pytest.raises(ValueError, match=r"features=7 must be even"):
        ConditionEmbedding(8, features=7)


def test_zero_reaches_every_parameter():
    module = zero_init(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    assert not any(parameter.any() for parameter in module.parameters())


def test_call_does_not_recompute_without_gradients():
    class Counter(nn.Linear):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    block, x = Counter(2, 2), torch.ones(1, 2)
    with torch.no_grad():
        checkpointed_call(block, x, recompute=True)
    assert block.calls == 1
    checkpointed_call(block, x, recompute=True).sum().backward()
    assert block.calls == 3


def test_a_condition_of_zeros_is_none_and_begins_without_a_say():
    embed = ConditionEmbedding(8, features=8, num_classes=2, conditions=3)
    t, label, told = torch.rand(4), torch.tensor([0, 1, 2, 0]), torch.rand(4, 3)
    assert torch.equal(embed(t, label, told), embed(t, label))
    torch.nn.init.ones_(embed.more.weight)
    assert torch.equal(embed(t, label, torch.zeros(4, 3)), embed(t, label))
    assert not torch.allclose(embed(t, label, told), embed(t, label))
