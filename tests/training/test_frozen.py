"""A base that is not trained: in no checkpoint and no average, and put back wherever it is."""

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import nn

pytest.importorskip("diffusers")

from exact_resume.checkpoint.store import load_state
from exact_resume.randomness import reseed
from runs import ROOT
from sturdy.training.build import build_module
from sturdy.training.ema import EMA, PowerEMA
from sturdy.training.ema_snapshots import reconstruct, snapshot
from sturdy.training.frozen import copy_trained, frozen_names
from sturdy.training.init_from import find_source, init_from
from tiny_module import Backbone, fit, make, save
from tiny_networks import adapter_words


def config(*overrides: str) -> dict:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", [*overrides, "data.shards=1"])
    return OmegaConf.to_container(cfg, resolve=True)


def base_bits(module: nn.Module) -> dict:
    return {k: v.clone() for k, v in module.denoiser.backbone.network.state_dict().items()}


def test_only_the_adapter_is_trained_averaged_and_saved(tmp_path):
    module = build_module(config(*adapter_words(tmp_path / "base", rank=64)))
    before = base_bits(module)
    trainer, _ = fit(module, tmp_path, steps=3)
    after = base_bits(module)
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert moved
    assert moved == [name for name in before if ".lora_" in name]

    path = save(trainer)
    stored = load_state(path)
    adapter = [f"backbone.network.{name}" for name in moved]
    expected = {f"{place}.{name}" for place in ("denoiser", "ema.model") for name in adapter}
    assert set(stored["state_dict"]) == expected
    (optimizer,) = stored["optimizer_states"]
    assert set(optimizer["state"]) == {f"denoiser.{name}" for name in adapter}
    n_bytes = sum(before[name].numel() * 4 for name in moved)
    assert path.stat().st_size < 5 * n_bytes, "the adapter, its average and two moments"
    whole = sum(tensor.numel() * 4 for tensor in before.values())
    assert whole > 1.5 * n_bytes, "control: what is left out would show"


def test_the_average_shares_the_base_and_is_of_the_adapter(tmp_path):
    denoiser = build_module(config(*adapter_words(tmp_path / "base"))).denoiser
    ema = EMA(denoiser, decay=0.5)
    names = frozen_names(denoiser)
    ours, theirs = (dict(network.named_parameters()) for network in (ema.model, denoiser))
    assert {name for name in ours if ours[name] is theirs[name]} == names
    beginning = {name: p.clone() for name, p in theirs.items()}
    left = 1.0  # the share of the beginning in the average
    for step in range(4):
        for name, parameter in theirs.items():
            if name not in names:
                parameter.data.copy_(beginning[name] + 1)
        ema.update(denoiser, step)
        left *= min(0.5, (1 + step) / (10 + step))
    for name in ours.keys() - names:
        assert torch.allclose(ours[name], beginning[name] + 1 - left, atol=1e-6)
    for name in names:
        assert torch.equal(ours[name], beginning[name])
    nn.ModuleList([denoiser, ema]).to(torch.float64)  # as when both are moved to a device
    ours, theirs = (dict(network.named_parameters()) for network in (ema.model, denoiser))
    assert {name for name in ours if ours[name] is theirs[name]} == names


def test_snapshots_hold_the_adapter_alone_and_are_put_together(tmp_path):
    denoiser = build_module(config(*adapter_words(tmp_path / "base"))).denoiser
    ema = PowerEMA(denoiser)
    for step in range(3):
        for parameter in denoiser.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.1)
        ema.update(denoiser, step)
    taken = snapshot(ema, 3)
    adapter = {name for name, p in denoiser.named_parameters() if p.requires_grad}
    assert all(set(average) == adapter for average in taken["averages"])
    weights = reconstruct([taken], 0.10)
    before = {name: p.clone() for name, p in ema.model.state_dict().items()}
    ema.model.load_state_dict(weights)
    after = ema.model.state_dict()
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)


def test_another_run_begins_from_an_adapter(tmp_path):
    settings = config(*adapter_words(tmp_path / "base"))
    module = build_module(settings)
    trainer, _ = fit(module, tmp_path, steps=2)
    path = save(trainer)
    other = build_module(settings | {"seed": 1})
    base = base_bits(other)
    assert "all 32 tensors taken" in init_from(other, find_source(str(path), tmp_path))
    for name, tensor in other.denoiser.state_dict().items():
        assert torch.equal(tensor, module.ema.model.state_dict()[name])
    now = base_bits(other)
    assert all(torch.equal(now[name], base[name]) for name in base if ".lora_" not in name)


def test_parameters_that_no_base_puts_back_are_saved_and_summed_as_ever(tmp_path):
    """A user's own backbone with a part that is not trained."""

    class PartlyFrozen(Backbone):
        def __init__(self, dropout):
            super().__init__(dropout)
            self.into.requires_grad_(False)

    module = make(backbone=PartlyFrozen)
    names = [name for name, _ in module.denoiser.named_parameters()]
    assert len(module.trained()) == len(names)
    trainer, _ = fit(module, tmp_path, steps=2)
    stored = load_state(save(trainer))["state_dict"]
    for name, tensor in module.denoiser.state_dict().items():
        assert torch.equal(stored[f"denoiser.{name}"], tensor)
    copied = copy_trained(module.denoiser)
    assert copied.backbone.into.weight is not module.denoiser.backbone.into.weight


def test_a_tensor_with_two_names_is_shared_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.own = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
            self.b.weight = self.a.weight
            self.register_buffer("table", torch.ones(2))

        def frozen_names(self):
            return {"a.weight", "b.weight", "table"}

    reseed("tied")
    network = nn.ModuleDict({"part": Tied()})
    part, copied = network["part"], copy_trained(network)["part"]
    assert copied.a.weight is copied.b.weight is part.a.weight
    assert copied.table is part.table
    assert copied.own.weight is not part.own.weight
    assert copied.a.bias is not part.a.bias
