"""Runs with callbacks.checkpoint.sharded=true under strategy=fsdp2: killed, moved and read."""

import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from exact_resume.__main__ import main
from exact_resume.checkpoint.compare import diff_checkpoints
from exact_resume.checkpoint.parts import part_name
from exact_resume.checkpoint.store import MANIFEST, STATE, Store, load_state
from runs import differences, run_script
from worlds import World, entries, finish, ledger

FSDP2 = ["strategy=fsdp2"]
SHARDED = [*FSDP2, "callbacks.checkpoint.sharded=true"]
OFTEN = ["callbacks.checkpoint.every_n_train_steps=1", "trainer.max_steps=8"]


@pytest.fixture(scope="module")
def tmp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with two runs on two processes: ``sharded``, and ``full`` to compare it with."""
    tmp = tmp_path_factory.mktemp("sharded")
    finish(tmp, "sharded", 2, *SHARDED, *OFTEN)
    finish(tmp, "full", 2, *FSDP2, *OFTEN)
    return tmp


def store_of(tmp: Path, name: str) -> Store:
    return Store(tmp / "runs" / name / "checkpoints")


def test_it_has_the_bits_of_the_full_checkpoint(tmp: Path) -> None:
    assert differences(tmp, "sharded", "full") == []
    store = store_of(tmp, "sharded")
    for step in store.steps():
        full, sharded = (
            load_state(store_of(tmp, name).state(step)) for name in ("full", "sharded")
        )
        assert full.keys() == sharded.keys()
        assert diff_checkpoints(full, sharded) == []
        names = {path.name for path in store.path(step).iterdir()} - {"score.json"}
        assert names == {STATE, MANIFEST, part_name(0), part_name(1)}
    assert store.scores("val/loss").keys() == store_of(tmp, "full").scores("val/loss").keys()


def kill_while_saving(tmp: Path, name: str, dice: random.Random) -> World | None:
    """Start the run, and kill one process or both at a random instant of a save."""
    world = World(tmp, name, 2, *SHARDED, *OFTEN)
    wanted = dice.randint(1, 3)  # which new temporary directory
    seen: set[str] = set()
    deadline = time.monotonic() + 120
    while len(seen) < wanted:
        seen |= {path.name for path in world.store.directory.glob(".step-*")}
        assert time.monotonic() < deadline, world.output()
        if 8 in world.store.steps():
            world.wait()
            return None
    time.sleep(dice.random() * 0.03)
    world.kill(*dice.choice([(0,), (1,), (0, 1)]))
    codes = world.wait()
    assert any(codes), codes
    return world


def survive(tmp: Path, name: str, seed: int, kills: int) -> None:
    dice = random.Random(seed)
    for _ in range(kills):
        if kill_while_saving(tmp, name, dice) is None:
            break
        store = store_of(tmp, name)
        for step in store.steps():
            store.verify(step)  # whatever has a name is complete
    world = finish(tmp, name, 2, *SHARDED, *OFTEN)
    assert differences(tmp, "sharded", name) == [], world.output()
    assert not [*store_of(tmp, name).directory.glob(".*")]
    assert not (store_of(tmp, name).directory / "quarantine").exists()


def test_kills_during_saves_change_no_bit(tmp: Path) -> None:
    survive(tmp, "killed", seed=0, kills=2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_many_kills_during_saves_change_no_bit(tmp: Path, seed: int) -> None:
    survive(tmp, f"killed-{seed}", seed, kills=4)


@pytest.mark.slow
def test_a_damaged_part_sends_the_run_to_the_checkpoint_before(tmp: Path) -> None:
    shutil.copytree(tmp / "runs" / "sharded", tmp / "runs" / "damaged")
    store = store_of(tmp, "damaged")
    (store.path(8) / part_name(1)).unlink()
    part = store.path(7) / part_name(0)
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    world = finish(tmp, "damaged", 2, *SHARDED, *OFTEN)
    assert "resumed from step 6" in world.output(0)
    assert differences(tmp, "sharded", "damaged") == []
    assert len([*(store.directory / "quarantine").glob("*.reason.txt")]) == 2


@pytest.mark.slow
def test_a_preempted_run_saves_and_goes_on(tmp: Path) -> None:
    words = [*SHARDED, "trainer.max_steps=8", "callbacks.checkpoint.every_n_train_steps=3"]
    world = World(tmp, "preempted", 2, *words).until(4).kill(1, number=signal.SIGTERM)
    assert world.wait() == [75, 75], world.output()
    assert max(world.store.steps()) >= 4
    finish(tmp, "preempted", 2, *words)
    assert differences(tmp, "sharded", "preempted") == []


WAYS = {  # who goes on: number of processes, strategy
    "single": (1, ["strategy=single"]),
    "one": (1, SHARDED),
    "four": (4, SHARDED),
    "ddp": (2, ["strategy=ddp"]),
    "full fsdp2": (2, FSDP2),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_any_world_and_strategy_goes_on(tmp: Path, way: str) -> None:
    processes, strategy = WAYS[way]
    name = f"to-{way.replace(' ', '-')}"
    start = store_of(tmp, "sharded")
    words = [*strategy, f"ckpt_path={start.path(6)}", "trainer.max_steps=7"]
    world = World(tmp, name, processes, *words)
    assert world.wait() == [0] * processes, world.output()
    expected = "bitwise" if way == "full fsdp2" else "(same samples"
    assert expected in world.output(0), world.output()
    there = store_of(tmp, name)
    odd = diff_checkpoints(load_state(start.state(6)), load_state(there.state(6)))
    assert [key for key in odd if not key.endswith("/lr")] == []  # that is set anew at each step


@pytest.mark.slow
def test_from_full_to_sharded(tmp: Path) -> None:
    start = store_of(tmp, "full")
    finish(tmp, "cut", 2, *SHARDED, f"ckpt_path={start.path(6)}", "trainer.max_steps=8")
    there = store_of(tmp, "cut")
    assert (there.path(6) / part_name(1)).is_file()
    assert diff_checkpoints(load_state(start.state(6)), load_state(there.state(6))) == []
    assert diff_checkpoints(load_state(start.state(8)), load_state(there.state(8))) == []


@pytest.mark.slow
def test_a_chain_of_worlds_sees_the_same_samples_and_noise(tmp: Path) -> None:
    finish(tmp, "alone", 1, first=ledger(tmp, "alone"))
    World(tmp, "chain", 2, *SHARDED, first=ledger(tmp, "chain")).until(4).kill().wait()
    World(tmp, "chain", 4, *SHARDED, first=ledger(tmp, "chain")).until(7).kill(3).wait()
    World(tmp, "chain", 1, *SHARDED, first=ledger(tmp, "chain")).until(10).kill().wait()
    finish(tmp, "chain", 2, *SHARDED, first=ledger(tmp, "chain"))
    assert entries(tmp, "chain") == entries(tmp, "alone")


def test_the_other_doors_read_it(tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(tmp / "runs" / "sharded")
    assert main(["verify", run]) == 0
    assert main(["status", run]) == 0
    assert main(["show", run]) == 0
    said = capsys.readouterr().out
    assert "denoiser" in said
    assert "yes, by its manifest.json" in said


@pytest.mark.slow
def test_images_are_drawn_from_it(tmp: Path) -> None:
    said = run_script(tmp, "sample", "run=sharded", "sample.n=2", "sampler.steps=2")
    assert "step 8" in said or "png" in said, said


@pytest.mark.slow
def test_another_run_begins_from_it(tmp: Path) -> None:
    world = finish(
        tmp, "begun", 1, "init_from=sharded", "trainer.max_steps=3", "backbone.dropout=0"
    )
    state = load_state(store_of(tmp, "begun").state(3))
    manifest = store_of(tmp, "sharded").manifest(8)
    assert state["init_from"]["sha256"] == manifest["files"][STATE]["sha256"], world.output()
