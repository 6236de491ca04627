"""A base that is not trained: in no checkpoint and no average, and put back wherever it is."""

import shutil
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import nn

pytest.importorskip("diffusers")

from exact_resume.checkpoint.compare import diff_checkpoints
from exact_resume.checkpoint.store import Store, load_state
from exact_resume.randomness import reseed
from runs import COMMON, ROOT, differences
from sturdy.fault_injection import FAULTS
from sturdy.training.build import build_module, load_module
from sturdy.training.ema import EMA, PowerEMA
from sturdy.training.ema_snapshots import reconstruct, snapshot
from sturdy.training.frozen import copy_trained, frozen_names
from sturdy.training.init_from import find_source, init_from
from tiny_module import Backbone, fit, make, save
from tiny_networks import CLASSES, NETWORKS, write_base
from worlds import World, finish

KIND, CONFIG = NETWORKS["classes"]


def hydra(value) -> str:
    """Return primitives as they are typed on the command line."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{hydra(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(hydra(v) for v in value) + "]"
    return "null" if value is None else str(value)


def words(folder: Path, dropout: float = 0.3, rank: int = 2, **base) -> list[str]:
    """Return the overrides of a run that trains an adapter for the base in ``folder``."""
    if not (folder / "unet").exists():
        write_base(folder, "classes")
    from sturdy.pretrained.borrowed import read_base

    named = {"path": str(folder), "sha256": read_base(str(folder), "unet")[1]} | base
    lora = {"rank": rank, "dropout": dropout}
    return [
        *(word for word in COMMON if not word.startswith("backbone.")),
        "backbone=borrowed",
        f"backbone.network={KIND}",
        f"backbone.config={hydra(CONFIG)}",
        f"backbone.base={hydra(named)}",
        f"backbone.lora={hydra(lora)}",
        f"num_classes={CLASSES}",
        "schedule=scaled_linear",
        "target=noise",
        "objective=discrete",
        "learning_rate.warmup=2",
        "optimizer.lr=0.01",
    ]


def config(*overrides: str) -> dict:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", [*overrides, "data.shards=1"])
    return OmegaConf.to_container(cfg, resolve=True)


def state(tmp: Path, name: str) -> dict:
    store = Store(tmp / "runs" / name / "checkpoints")
    return load_state(store.state(store.last()["step"]))


@pytest.fixture(scope="module")
def tmp(tmp_path_factory) -> Path:
    """The finished run ``once``."""
    folder = tmp_path_factory.mktemp("frozen")
    finish(folder, "once", 1, base=words(folder / "base"))
    return folder


def base_bits(module: nn.Module) -> dict:
    return {k: v.clone() for k, v in module.denoiser.backbone.network.state_dict().items()}


def test_only_the_adapter_is_trained_averaged_and_saved(tmp_path):
    module = build_module(config(*words(tmp_path / "base", rank=64)))
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
    denoiser = build_module(config(*words(tmp_path / "base"))).denoiser
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
    moved = denoiser.to(torch.float64)
    assert all(p.dtype == torch.float64 for p in moved.parameters())


def test_snapshots_hold_the_adapter_alone_and_are_put_together(tmp_path):
    denoiser = build_module(config(*words(tmp_path / "base"))).denoiser
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
    settings = config(*words(tmp_path / "base"))
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


def refused(tmp: Path, name: str, base: list[str]) -> str:
    """Return what a start prints that is refused."""
    world = World(tmp, name, 1, base=base)
    assert world.wait() == [2]
    assert "Traceback" not in world.output()
    return world.output()


def test_a_killed_run_ends_in_the_same_bits(tmp):
    base = words(tmp / "base")
    World(tmp, "killed", 1, base=base).until(4).kill().wait()
    finish(tmp, "killed", 1, base=base)
    assert differences(tmp, "once", "killed") == []
    assert all(".lora_" in name for name in state(tmp, "once")["state_dict"])


def test_control_dropout_of_an_adapter_that_is_not_reseeded_is_seen(tmp):
    base = words(tmp / "base")
    finish(tmp, "unseeded", 1, base=base, first=lambda rank: FAULTS["dropout"]())
    assert differences(tmp, "once", "unseeded")


def test_a_base_that_moved_goes_on_with_the_same_bits_and_one_that_changed_does_not(tmp):
    old, new = tmp / "old-place", tmp / "new-place"
    shutil.copytree(tmp / "base", old)
    base = words(old)
    finish(tmp, "moved", 1, "trainer.max_steps=6", base=base)
    old.rename(new)
    assert f"backbone.base.path={old} is not there" in refused(tmp, "moved", base)
    write_base(old, "classes", seed=1)
    changed = refused(tmp, "moved", base)
    assert all(word in changed for word in (str(old), "changed", "Expected SHA-256", "found"))
    # the command names the other weights
    assert "backbone.base.sha256" in refused(tmp, "moved", words(old))
    assert "bitwise" in finish(tmp, "moved", 1, base=words(new)).output()
    assert differences(tmp, "once", "moved") == []


def test_a_run_is_loaded_for_sampling_with_its_base_and_compared_without(tmp):
    path = Store(tmp / "runs" / "once" / "checkpoints").state(12)
    module = load_module(path, training=False)
    x, t, label = torch.randn(2, 3, 16, 16), torch.tensor([0.3, 0.8]), torch.tensor([0, 1])
    stored = state(tmp, "once")["state_dict"]
    own = module.state_dict()
    assert all(torch.equal(own[name], stored[name]) for name in stored)
    folder = tmp / "base"
    kept = folder.rename(tmp / "elsewhere")
    try:
        with pytest.raises(ValueError, match=rf"base\.path={folder} is not there"):
            load_module(path, training=False)
        assert diff_checkpoints(load_state(path), load_state(path)) == []
        assert Store(path.parents[1]).last()["step"] == 12
    finally:
        kept.rename(folder)
    again = load_module(path)
    with torch.no_grad():
        assert torch.equal(again.ema.model(x, t, label), module.ema.model(x, t, label))


def test_a_whole_network_is_resumed_and_sampled_without_its_base(tmp):
    base = [word for word in words(tmp / "whole") if not word.startswith("backbone.lora")]
    finish(tmp, "whole", 1, "trainer.max_steps=4", base=base)
    shutil.rmtree(tmp / "whole")
    finish(tmp, "whole", 1, "trainer.max_steps=6", base=base)
    module = load_module(Store(tmp / "runs" / "whole" / "checkpoints").state(6), training=False)
    whole = len(module.denoiser.backbone.network.state_dict())
    assert len(state(tmp, "whole")["state_dict"]) == 2 * whole


def test_processes_agree_whatever_their_number(tmp):
    base = [*words(tmp / "base"), "data.shards=2", "reduction=tree", "trainer.max_steps=6"]
    finish(tmp, "one", 1, base=base)
    finish(tmp, "two", 2, base=base)
    assert differences(tmp, "one", "two") == []
    summed = [word.replace("=tree", "=allreduce") for word in base]
    finish(tmp, "summed", 2, base=summed)
    World(tmp, "broken-off", 2, base=summed).until(4).kill().wait()
    finish(tmp, "broken-off", 2, base=summed)
    assert differences(tmp, "summed", "broken-off") == []
    world = World(tmp, "cut", 2, "strategy=fsdp2", base=base)
    assert world.wait() == [2, 2]
    assert "use strategy=ddp" in world.output(0)
