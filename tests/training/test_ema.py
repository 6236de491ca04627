"""The average against closed forms."""

import pytest
import torch
from torch import nn

from sturdy.training.ema import EMA


def constant(value):
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(value)
    return model


def test_of_a_step_from_0_to_1_it_is_one_minus_the_product_of_betas():
    ema, model = EMA(constant(0.0), decay=0.5), constant(1.0)
    expected = 1.0
    for step in range(12):
        ema.update(model, step)
        expected *= min(0.5, (1 + step) / (10 + step))
        assert ema.model.weight.item() == pytest.approx(1 - expected, abs=1e-6)


def test_of_a_line_it_lags_by_a_constant():
    """theta(k) = k: with beta = 1/2 the average converges to k - beta / (1 - beta) = k - 1."""
    ema = EMA(constant(0.0), decay=0.5)
    for step in range(60):
        ema.update(constant(float(step)), step)
    assert ema.model.weight.item() == pytest.approx(59 - 1, abs=1e-4)


def test_the_first_update_forgets_nine_tenths_of_the_initialisation():
    ema = EMA(constant(1.0), decay=0.999)
    ema.update(constant(0.0), 0)
    assert ema.model.weight.item() == pytest.approx(0.1)


def test_late_updates_have_the_full_decay():
    ema = EMA(constant(1.0), decay=0.9)
    ema.update(constant(0.0), 10**6)
    assert ema.model.weight.item() == pytest.approx(0.9)


def test_it_is_a_frozen_copy_in_eval_mode_whatever_its_parent_does():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    parent = nn.ModuleDict({"model": model, "ema": EMA(model)}).train()
    assert model.training
    assert not any(m.training for m in parent["ema"].modules())
    assert not any(p.requires_grad for p in parent["ema"].parameters())
    model[0].weight.data.zero_()
    assert parent["ema"].model[0].weight.abs().sum() > 0


def test_buffers_are_copied_not_averaged():
    model = nn.BatchNorm1d(2)
    ema = EMA(model, decay=0.9)
    model(torch.randn(8, 2) + 3)
    ema.update(model, 10**6)
    assert torch.equal(ema.model.running_mean, model.running_mean)
    assert ema.model.num_batches_tracked == 1
