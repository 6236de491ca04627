"""The LightningModule in real fits of a tiny denoiser."""

from functools import partial

import pytest
import torch
from torch.utils.data import DataLoader

from exact_resume.checkpoint.store import load_state
from exact_resume.randomness import Draws, key
from sturdy.diffusion import Denoiser, Objective, RectifiedFlow, Velocity
from sturdy.training.ema import EMA
from sturdy.training.module import DiffusionModule
from tiny_module import CLASSES, SGD, Backbone, batch, fit, make, save, trainer

ADAMW = partial(torch.optim.AdamW, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.01)


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.denoiser.parameters()])


def distance(a, b):
    return (weights(a) - weights(b)).norm().item()


def test_one_step_is_the_gradient_of_the_mean_loss(tmp_path):
    """Against plain autograd, with the loss of the whole batch."""
    module, reference = make(optimizer=SGD, clip=float("inf")), make()
    _, (output,) = fit(module, tmp_path, steps=1)
    x0, label, positions = batch(0)
    loss = reference.objective(reference.denoiser, x0, label, Draws(0, positions)).mean()
    loss.backward()
    assert torch.equal(output["loss"], loss.detach())
    for p, q in zip(module.denoiser.parameters(), reference.denoiser.parameters(), strict=True):
        assert torch.allclose(p, q if q.grad is None else q - 0.5 * q.grad, atol=1e-6)
    norm = torch.cat(
        [p.grad.flatten() for p in reference.denoiser.parameters() if p.grad is not None]
    ).norm()
    assert torch.allclose(output["grad_norm"], norm)


@pytest.mark.parametrize("shards", [2, 4, 8])
def test_shards_compute_the_same_up_to_rounding(shards, tmp_path):
    one, many = make(optimizer=SGD), make(optimizer=SGD, shards=shards)
    (_, a), (_, b) = fit(one, tmp_path), fit(many, tmp_path)
    assert distance(one, many) < 1e-5 < 1e-2 < distance(one, make())
    assert torch.allclose(a[-1]["loss"], b[-1]["loss"], atol=1e-5)


@pytest.mark.parametrize("shards", [1, 4])
def test_a_run_is_a_function_of_its_seed(shards, tmp_path):
    def run(seed):
        module = make(dropout=0.5, optimizer=ADAMW, seed=seed, shards=shards)
        torch.manual_seed(torch.seed())  # whatever the default generator has been up to
        return module, fit(module, tmp_path)[1]

    (a, x), (b, y), (c, _) = run(1), run(1), run(2)
    assert torch.equal(weights(a), weights(b))
    assert all(torch.equal(p[k], q[k]) for p, q in zip(x, y, strict=True) for k in p)
    assert distance(a, c) > 1e-3, "another seed is another run"


def test_the_gradient_is_clipped_and_its_norm_reported_before(tmp_path):
    module, before = make(optimizer=partial(torch.optim.SGD, lr=1.0), clip=0.01), make()
    _, (output,) = fit(module, tmp_path, steps=1)
    assert output["grad_norm"] > 0.1
    assert distance(module, before) == pytest.approx(0.01, rel=1e-3)


def test_the_learning_rate_is_a_function_of_the_step(tmp_path):
    module = make(optimizer=SGD, learning_rate=lambda step: 0.0 if step == 0 else 0.25)
    t, _ = fit(module, tmp_path, steps=1)
    assert distance(module, make()) == 0
    t, _ = fit(make(optimizer=SGD, learning_rate=lambda step: 0.25), tmp_path, steps=1)
    assert [g["lr"] for g in t.optimizers[0].param_groups] == [0.125, 0.125]


def test_the_average_is_of_the_weights_after_each_step(tmp_path):
    module = make(optimizer=SGD)
    start, average = weights(module), module.ema.model
    fit(module, tmp_path, steps=1)
    expected = torch.lerp(start, weights(module), 0.9)  # beta(0) = 1/10
    assert torch.allclose(
        torch.cat([p.flatten() for p in average.parameters()]), expected, atol=1e-6
    )


def test_a_run_entered_at_a_checkpoint_is_the_undisturbed_one(tmp_path):
    whole = make(dropout=0.5, optimizer=ADAMW, shards=2)
    t, losses = fit(whole, tmp_path / "whole", steps=4)
    half, _ = fit(make(dropout=0.5, optimizer=ADAMW, shards=2), tmp_path / "half", steps=2)
    path = save(half)
    again = make(dropout=0.5, optimizer=ADAMW, shards=2)
    u, rest = fit(again, tmp_path / "half", steps=4, entry=path)
    assert u.global_step == 4
    assert torch.equal(rest[-1]["loss"], losses[-1]["loss"])
    a, b = t.optimizers[0].state_dict()["state"], u.optimizers[0].state_dict()["state"]
    assert a.keys() == b.keys()
    assert all(torch.equal(a[i][k], b[i][k]) for i in a for k in a[i])
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in whole.state_dict().items())


def test_options_of_the_optimizer_are_the_configs_also_when_its_state_is_loaded(tmp_path):
    t, _ = fit(make(optimizer=ADAMW), tmp_path, steps=1)
    path = save(t)
    other = partial(torch.optim.AdamW, lr=1e-2, betas=(0.8, 0.95), weight_decay=0.5)
    u, _ = fit(make(optimizer=other), tmp_path, steps=2, entry=path)
    decayed, plain = u.optimizers[0].param_groups
    assert decayed["betas"] == (0.8, 0.95)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.5, 0.0)
    assert u.optimizers[0].state_dict()["state"][0]["step"] == 2, "the state was not loaded"


def test_validation_is_the_averages_loss_and_the_same_each_time(tmp_path):
    module = make(dropout=0.5, optimizer=SGD)
    fit(module, tmp_path)
    loader = DataLoader([batch(0), batch(1, size=3)], batch_size=None)

    def validate():
        torch.manual_seed(torch.seed())
        validator = trainer(tmp_path, 1)
        validator.validate(module, loader, verbose=False)
        return validator.callback_metrics["val/loss"].item()

    losses = []
    for x0, label, positions in (batch(0), batch(1, size=3)):
        draws = Draws(key(0, "validation"), positions)
        losses.append(module.objective(module.ema.model, x0, label, draws))
    first = validate()
    assert first == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5), (
        "each image counts the same"
    )
    assert validate() == first
    module.denoiser.backbone.out.weight.data.zero_()
    assert validate() == first, "the weights being trained have no part in it"
    module.ema.model.backbone.out.weight.data.zero_()
    assert validate() != first


def test_checkpoints_are_tensors_and_primitives_and_load_in_plain_lightning(tmp_path):
    module = make(optimizer=ADAMW, config={"seed": 0})
    t, _ = fit(module, tmp_path)
    path = save(t)
    state = load_state(path)
    assert state["config"] == {"seed": 0}
    names = {f"denoiser.{name}" for name, _ in module.denoiser.named_parameters()}
    assert set(state["optimizer_states"][0]["state"]) == names

    denoiser = Denoiser(Backbone(), RectifiedFlow(), Velocity(), CLASSES)
    loaded = DiffusionModule.load_from_checkpoint(
        path, denoiser=denoiser, objective=Objective(), weights_only=True
    )
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in module.state_dict().items())
    assert isinstance(loaded.ema, EMA)


def test_diverged_weights_are_not_saved(tmp_path):
    module = make(optimizer=partial(torch.optim.SGD, lr=1e38), clip=float("inf"))
    t, _ = fit(module, tmp_path, steps=3)
    with pytest.raises(FloatingPointError, match="not finite at step 3"):
        save(t)
    assert t.strategy.checkpoint_io.store.steps() == []


def test_a_checkpoint_belongs_under_its_own_step(tmp_path):
    t, _ = fit(make(), tmp_path)
    with pytest.raises(ValueError, match="step 2 belongs at"):
        t.save_checkpoint(tmp_path / "step-00000003" / "state.ckpt")
