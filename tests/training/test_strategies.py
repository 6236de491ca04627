"""single, ddp and fsdp2: one checkpoint for all, one order of samples and noise, through kills."""

from itertools import permutations
from pathlib import Path

import pytest
import torch

from exact_resume.checkpoint.compare import diff_checkpoints
from exact_resume.checkpoint.store import Store, load_state
from runs import differences
from worlds import SHARDED, SHARDED_UNET, World, entries, finish, ledger


@pytest.fixture(scope="module")
def tmp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp = tmp_path_factory.mktemp("strategies")
    finish(tmp, "single", 1, first=ledger(tmp, "single"))
    return tmp


@pytest.mark.slow
def test_a_chain_of_all_three_sees_the_same_samples_and_noise(tmp: Path) -> None:
    World(tmp, "chain", 1, first=ledger(tmp, "chain")).until(4).kill().wait()
    by_fsdp = ["strategy=fsdp2", "reduction=allreduce"]  # on the tree: test_fsdp2_tree.py
    for words, step in ((by_fsdp, 7), (["strategy=ddp"], 10)):
        world = World(tmp, "chain", 2, *words, first=ledger(tmp, "chain")).until(step).kill()
        world.wait()
        assert "(same samples" in world.output(0), world.output()
    finish(tmp, "chain", 2, *by_fsdp, first=ledger(tmp, "chain"))
    assert entries(tmp, "chain") == entries(tmp, "single")
    a, b = (newest(tmp, name)["state_dict"] for name in ("single", "chain"))
    assert all(torch.allclose(a[k], b[k], atol=2e-4) for k in a)
    assert differences(tmp, "single", "chain"), "then it promises too little"


RING = (("single", "fsdp2"), ("fsdp2", "ddp"), ("ddp", "single"))  # who writes, who reads
ALL = tuple(permutations(("single", "ddp", "fsdp2"), 2))


@pytest.mark.parametrize(
    ("base", "pairs"),
    [
        pytest.param(SHARDED, RING, id="dit"),
        pytest.param(SHARDED, ALL, id="dit-all", marks=pytest.mark.slow),
        pytest.param(SHARDED_UNET, ALL, id="unet", marks=pytest.mark.slow),
    ],
)
def test_each_reads_the_checkpoint_of_each_to_the_bit(
    tmp: Path, base: list[str], pairs: tuple[tuple[str, str], ...], request: pytest.FixtureRequest
) -> None:
    """A checkpoint written by one and written again by another, with no step between, holds the
    same.
    """
    ways = {"single": (1, "single"), "ddp": (2, "ddp"), "fsdp2": (2, "fsdp2")}
    kind = request.node.callspec.id
    for name, (n, strategy) in ways.items():
        World(
            tmp, f"{kind}-{name}", n, f"strategy={strategy}", "trainer.max_steps=3", base=base
        ).wait()
    for writer, reader in pairs:
        written = Store(tmp / "runs" / f"{kind}-{writer}" / "checkpoints")
        n, strategy = ways[reader]
        name = f"{kind}-{writer}-{reader}"
        ckpt = f"ckpt_path={written.state(3).parent}"
        world = World(tmp, name, n, f"strategy={strategy}", ckpt, "trainer.max_steps=4", base=base)
        world.wait()
        there = Store(tmp / "runs" / name / "checkpoints")
        assert 3 in there.steps(), world.output()
        odd = diff_checkpoints(load_state(written.state(3)), load_state(there.state(3)))
        assert [k for k in odd if not k.endswith("/lr")] == [], (
            writer,
            reader,
        )  # that is set anew at every step


def newest(tmp: Path, name: str) -> dict:
    store = Store(tmp / "runs" / name / "checkpoints")
    return load_state(store.state(store.steps()[-1]))
