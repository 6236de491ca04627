"""Real runs that train an adapter: killed, moved, in several processes, and without their base."""

import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

from exact_resume.checkpoint.compare import diff_checkpoints
from exact_resume.checkpoint.store import Store, load_state
from runs import differences
from sturdy.fault_injection import FAULTS
from sturdy.training.build import load_module
from tiny_networks import adapter_words, write_base
from worlds import World, finish


@pytest.fixture(scope="module")
def tmp(tmp_path_factory) -> Path:
    """The finished run ``once``."""
    folder = tmp_path_factory.mktemp("frozen")
    finish(folder, "once", 1, base=adapter_words(folder / "base"))
    return folder


def state(tmp: Path, name: str) -> dict:
    store = Store(tmp / "runs" / name / "checkpoints")
    return load_state(store.state(store.last()["step"]))


def refused(tmp: Path, name: str, base: list[str]) -> str:
    """Return what a start prints that is refused."""
    world = World(tmp, name, 1, base=base)
    assert world.wait() == [2]
    assert "Traceback" not in world.output()
    return world.output()


def test_a_killed_run_ends_in_the_same_bits(tmp):
    base = adapter_words(tmp / "base")
    World(tmp, "killed", 1, base=base).until(4).kill().wait()
    finish(tmp, "killed", 1, base=base)
    assert differences(tmp, "once", "killed") == []
    assert all(".lora_" in name for name in state(tmp, "once")["state_dict"])


def test_control_dropout_of_an_adapter_that_is_not_reseeded_is_seen(tmp):
    base = adapter_words(tmp / "base")
    finish(tmp, "unseeded", 1, base=base, first=lambda rank: FAULTS["dropout"]())
    assert differences(tmp, "once", "unseeded")


def test_a_base_that_moved_goes_on_with_the_same_bits_and_one_that_changed_does_not(tmp):
    old, new = tmp / "old-place", tmp / "new-place"
    shutil.copytree(tmp / "base", old)
    base = adapter_words(old)
    finish(tmp, "moved", 1, "trainer.max_steps=6", base=base)
    old.rename(new)
    assert f"backbone.base.path={old} is not there" in refused(tmp, "moved", base)
    write_base(old, "classes", seed=1)
    changed = refused(tmp, "moved", base)
    assert all(word in changed for word in (str(old), "changed", "Expected SHA-256", "found"))
    # the command names the other weights
    assert "backbone.base.sha256" in refused(tmp, "moved", adapter_words(old))
    assert "bitwise" in finish(tmp, "moved", 1, base=adapter_words(new)).output()
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
        elsewhere = load_module(path, training=False, paths={"base": str(kept)})
        assert diff_checkpoints(load_state(path), load_state(path)) == []
        assert Store(path.parents[1]).last()["step"] == 12
    finally:
        kept.rename(folder)
    again = load_module(path)
    with torch.no_grad():
        expected = module.ema.model(x, t, label)
        assert torch.equal(again.ema.model(x, t, label), expected)
        assert torch.equal(elsewhere.ema.model(x, t, label), expected)


def test_a_whole_network_is_resumed_and_sampled_without_its_base(tmp):
    base = [word for word in adapter_words(tmp / "whole") if not word.startswith("backbone.lora")]
    finish(tmp, "whole", 1, "trainer.max_steps=4", base=base)
    shutil.rmtree(tmp / "whole")
    finish(tmp, "whole", 1, "trainer.max_steps=6", base=base)
    module = load_module(Store(tmp / "runs" / "whole" / "checkpoints").state(6), training=False)
    whole = len(module.denoiser.backbone.network.state_dict())
    assert len(state(tmp, "whole")["state_dict"]) == 2 * whole


@pytest.mark.slow
def test_processes_agree_whatever_their_number(tmp):
    base = [*adapter_words(tmp / "base"), "data.shards=2", "reduction=tree", "trainer.max_steps=4"]
    finish(tmp, "one", 1, base=base)
    finish(tmp, "two", 2, base=base)
    assert differences(tmp, "one", "two") == []
    world = World(tmp, "cut", 2, "strategy=fsdp2", base=base)
    assert world.wait() == [2, 2]
    assert "use strategy=ddp" in world.output(0)


@pytest.mark.slow
def test_killed_processes_that_average_at_once_end_in_the_same_bits(tmp):
    base = [*adapter_words(tmp / "base"), "data.shards=2", "trainer.max_steps=6"]
    summed = [*base, "reduction=allreduce"]
    finish(tmp, "summed", 2, base=summed)
    World(tmp, "broken-off", 2, base=summed).until(4).kill().wait()
    finish(tmp, "broken-off", 2, base=summed)
    assert differences(tmp, "summed", "broken-off") == []
