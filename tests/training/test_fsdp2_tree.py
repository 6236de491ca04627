"""fsdp2 through kills: on the fixed tree any number of processes gives one hash.

The optimizer is not fused where worlds are compared: that of a CPU rounds the last numbers of a
tensor otherwise than the others, so that a part of a parameter gets other bits than the whole.
"""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from omegaconf import OmegaConf

from exact_resume.reduction import own_shards, reduction_id
from exact_resume.resume import ResumePoint
from runs import differences
from sturdy.training.parts import steps_equally_in_parts
from sturdy.training.trainer import resolve_run_defaults
from worlds import SHARDED, SHARDED_UNET, World, entries, finish, ledger

CUT = "strategy=fsdp2"
EXACT = ["optimizer.fused=false", "clip=0.1", "trainer.max_steps=6"]
DIT = [*SHARDED, *EXACT]
UNET = [*SHARDED_UNET, *EXACT, "ema=power"]
ALIGNED = [*DIT, "alignment=embedded"]
BACKEND = ["reduction=allreduce", "trainer.max_steps=9"]  # FSDP's own reduce-scatter


@pytest.fixture(scope="module")
def tmp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where ``one`` ran undisturbed on one process."""
    tmp = tmp_path_factory.mktemp("fsdp2-tree")
    finish(tmp, "one", 1, base=DIT, first=ledger(tmp, "one"))
    return tmp


def test_two_processes_give_the_bits_of_one(tmp: Path) -> None:
    world = finish(tmp, "two", 2, CUT, base=DIT, first=ledger(tmp, "two"))
    assert differences(tmp, "one", "two") == []
    assert entries(tmp, "one") == entries(tmp, "two")
    assert world.output(1) == ""
    assert world.store.last()["fingerprint"]["stack"]["gradients"] == "tree over 4 shards"


@pytest.mark.slow
def test_four_processes_give_the_bits_of_one(tmp: Path) -> None:
    finish(tmp, "four", 4, CUT, base=DIT)
    assert differences(tmp, "one", "four") == []


@pytest.mark.slow
@pytest.mark.parametrize("words", [["data.shards=8"], ["trainer.precision=bf16-mixed"]])
def test_other_settings(tmp: Path, words: list[str]) -> None:
    name = words[0].replace("=", "-")
    for n in (1, 2):
        finish(tmp, f"{name}-{n}", n, CUT, *words, base=DIT)
    assert differences(tmp, f"{name}-1", f"{name}-2") == []


@pytest.mark.slow
@pytest.mark.parametrize("base", [UNET, ALIGNED], ids=["unet", "aligned"])
def test_networks_whose_layers_share_inputs(tmp: Path, base: list[str], request) -> None:
    name = request.node.callspec.id
    for n in (1, 2, 4):
        finish(tmp, f"{name}-{n}", n, CUT, base=base)
        assert differences(tmp, f"{name}-1", f"{name}-{n}") == []


@pytest.mark.slow
def test_one_killed_of_two_and_ended_on_other_worlds(tmp: Path) -> None:
    whole = [*DIT, "trainer.max_steps=12"]
    finish(tmp, "whole", 1, base=whole)
    World(tmp, "chain", 2, CUT, base=whole).until(4).kill(1).wait()
    for n, words, step in ((4, [CUT], 7), (2, [], 10)):
        world = World(tmp, "chain", n, *words, base=whole).until(step).kill()
        world.wait()
        assert "(bitwise" in world.output(0), world.output()
    assert "(bitwise" in finish(tmp, "chain", 2, CUT, base=whole).output(0)
    assert differences(tmp, "whole", "chain") == []


# --- Controls: without one part of it, the bits are others


def without_tree(rank: int) -> None:
    """Sum as the backend does."""
    from exact_resume.reduction import TreeReduceScatter

    def scatter(self, output_tensor, input_tensor, group, op, async_op=False):
        dist.reduce_scatter_tensor(output_tensor, input_tensor, group=group)

    TreeReduceScatter.__call__ = scatter  # type: ignore[method-assign]


def without_norm(rank: int) -> None:
    """Compute the norm of the gradient from the parts, as FSDP does."""
    import sturdy.training.module as module

    module.exact_norm = torch.nn.utils.get_total_norm


def without_turns(rank: int) -> None:
    """Give each process consecutive shards."""
    import sturdy.data.datamodule as data
    import sturdy.training.module as module

    def consecutive(shards, rank, processes, *, interleaved=False):
        return own_shards(shards, rank, processes)

    data.own_shards = module.own_shards = consecutive


def without_hooks(rank: int) -> None:
    """Leave FSDP's own nodes in the autograd graph."""
    import sturdy.training.strategies as strategies

    strategies.keep_autograd_graph = lambda layer: None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "n", "base"),
    [
        (without_tree, 4, DIT),
        (without_norm, 2, DIT),
        (without_turns, 2, DIT),
        (without_hooks, 2, UNET),
    ],
)
def test_control_without_one_part_the_bits_differ(tmp: Path, first, n: int, base) -> None:
    name = first.__name__
    finish(tmp, f"{name}-1", 1, base=base)
    finish(tmp, name, n, CUT, base=base, first=first)
    assert differences(tmp, f"{name}-1", name), "this part is not needed"


# --- FSDP's own reduce-scatter: the same bits on as many processes


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 4])
def test_the_backend_gives_the_same_bits_in_the_same_world(tmp: Path, n: int) -> None:
    name = f"backend-{n}"
    finish(tmp, name, n, CUT, *BACKEND, base=SHARDED)
    World(tmp, f"{name}-killed", n, CUT, *BACKEND, base=SHARDED).until(5).kill(n - 1).wait()
    world = finish(tmp, f"{name}-killed", n, CUT, *BACKEND, base=SHARDED)
    assert "(bitwise" in world.output(0), world.output()
    assert differences(tmp, name, f"{name}-killed") == []


@pytest.mark.slow
def test_control_the_backend_gives_other_bits_in_another_world(tmp: Path) -> None:
    finish(tmp, "backend", 4, CUT, "reduction=allreduce", base=DIT)
    assert differences(tmp, "one", "backend")


# --- An optimizer that rounds parts otherwise


@pytest.mark.slow
def test_a_fused_optimizer_on_a_cpu_promises_bits_in_the_same_world_only(tmp: Path) -> None:
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("this CPU rounds all numbers of a tensor in one way")
    base = [*SHARDED, "trainer.max_steps=9"]
    finish(tmp, "fused-1", 1, base=base)
    finish(tmp, "fused-2", 2, CUT, base=base)
    assert differences(tmp, "fused-1", "fused-2"), "then it promises too little"
    World(tmp, "fused", 2, CUT, base=base).until(5).kill().wait()
    assert "(bitwise" in finish(tmp, "fused", 2, CUT, base=base).output(0)
    assert differences(tmp, "fused-2", "fused") == []
    World(tmp, "moved", 1, base=base).until(5).kill().wait()
    world = finish(tmp, "moved", 2, CUT, base=base)
    assert "(same samples" in world.output(0)
    assert "fsdp2 tree over 4 shards on 2 processes" in world.output(0)


def test_which_optimizers_step_equally_in_parts() -> None:
    cpu = torch.device("cpu")
    adam = partial(torch.optim.AdamW, lr=1e-3)
    assert steps_equally_in_parts(partial(adam, fused=False), cpu)
    assert steps_equally_in_parts(partial(adam, foreach=True), cpu)
    assert steps_equally_in_parts(partial(torch.optim.SGD, lr=0.1, momentum=0.9), cpu)
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        for options in ({}, {"betas": (0.9, 0.95)}, {"lr": 1e-5}, {"weight_decay": 0.1}):
            assert not steps_equally_in_parts(partial(adam, fused=True, **options), cpu)
    for whole in (torch.optim.Muon, torch.optim.Adafactor):
        assert not steps_equally_in_parts(partial(whole, lr=1e-3), cpu)
    assert not steps_equally_in_parts(torch.optim.LBFGS, cpu), "it cannot take this step"


# --- What a run keeps


def resolved(asked: str | None, monkeypatch, noted: str = "", gradients: str = "") -> str:
    """Return the reduction of two processes under fsdp2, after what the checkpoint has noted."""
    monkeypatch.setattr("exact_resume.distributed.world_size", lambda: 2)
    cfg = OmegaConf.create(
        {
            "strategy": {"_target_": "sturdy.training.strategies.fsdp2"},
            "data": {"shards": 4, "batch_size": 8},
            "reduction": asked,
            "resume": {"added": {}},
            "trainer": {"threads": 1},
        }
    )
    point = None
    if noted:
        config = {"data.shards": 4, "reduction": noted}
        stack = {"gradients": gradients}
        manifest = {"fingerprint": {"config": config, "stack": stack}}
        point = ResumePoint(Path("state.ckpt"), 3, manifest, explicit=False)
    resolve_run_defaults(cfg, point)
    return cfg.reduction


def test_runs_of_older_versions_keep_their_reduction(monkeypatch) -> None:
    old = reduction_id(4, 2, "fsdp2")
    assert old == "fsdp2 over 4 shards on 2 processes"
    for noted in ("tree", "allreduce"):  # null was noted as the first
        assert resolved(None, monkeypatch, noted, old) == "allreduce"
    assert resolved(None, monkeypatch) == "allreduce"
    assert resolved("tree", monkeypatch) == "tree"
    on_tree = reduction_id(4, 2, "tree")
    assert resolved(None, monkeypatch, "tree", on_tree) == "tree"


@pytest.mark.parametrize("interleaved", [False, True])
def test_every_shard_is_computed_by_one_process(interleaved: bool) -> None:
    for processes in (1, 2, 4, 8):
        parts = [own_shards(8, r, processes, interleaved=interleaved) for r in range(processes)]
        assert sorted(shard for part in parts for shard in part) == list(range(8))
