"""One hash on one, two and four processes, through kills, with dropout, clipping and classes."""

import math
import signal
from pathlib import Path

import pytest
import torch

from exact_resume.checkpoint.store import Store, load_state
from runs import differences, losses
from worlds import SHARDED, SHARDED_UNET, World, entries, finish, ledger


@pytest.fixture(scope="module")
def tmp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where ``one`` ran undisturbed on one process."""
    tmp = tmp_path_factory.mktemp("worlds")
    finish(tmp, "one", 1, first=ledger(tmp, "one"))
    return tmp


@pytest.mark.parametrize("n", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_more_processes_give_the_same_bits(tmp: Path, n: int) -> None:
    world = finish(tmp, f"on-{n}", n)
    assert differences(tmp, "one", f"on-{n}") == []
    assert [world.output(rank) for rank in range(1, n)] == [""] * (n - 1)


def test_killed_on_one_two_and_four_and_ended_on_one(tmp: Path) -> None:
    World(tmp, "chain", 1).until(4).kill().wait()
    for n, step in ((2, 7), (4, 10)):
        world = World(tmp, "chain", n).until(step).kill()
        world.wait()
        assert f"8 classes, {n} processes; resumed from step" in world.output(0)
        assert "(bitwise" in world.output(0)
    assert "(bitwise" in finish(tmp, "chain", 1).output()
    assert differences(tmp, "one", "chain") == []


def test_unet_on_two(tmp: Path) -> None:
    finish(tmp, "unet-1", 1, base=SHARDED_UNET)
    finish(tmp, "unet-2", 2, base=SHARDED_UNET)
    assert differences(tmp, "unet-1", "unet-2") == []


def test_an_all_reduce_gives_other_bits_from_the_same_samples(tmp: Path) -> None:
    finish(tmp, "all", 4, "reduction=allreduce", first=ledger(tmp, "all"))
    odd = differences(tmp, "one", "all")
    assert odd, (
        "an all-reduce over four processes happened to sum like the tree: this control controls "
        "nothing"
    )
    a, b = (final(tmp, name) for name in ("one", "all"))
    assert all(torch.allclose(a[k], b[k], atol=2e-4) for k in a)
    for mine, theirs in zip(losses(tmp, "one"), losses(tmp, "all"), strict=True):
        assert mine[0] == theirs[0]
        assert all(
            math.isclose(float(x or 0), float(y or 0), rel_tol=1e-4)
            for x, y in zip(mine, theirs, strict=True)
        )
    noted = entries(tmp, "one")
    assert len(noted) == 12 * 8 * len({line.split()[2] for line in noted})
    assert entries(tmp, "all") == noted


def test_resuming_with_another_sum_says_so(tmp: Path) -> None:
    World(tmp, "mixed", 2).until(6).kill().wait()
    output = finish(tmp, "mixed", 4, "reduction=allreduce").output(0)
    assert "same samples" in output
    assert "gradients: tree over 4 shards -> allreduce over 4 shards on 4 processes" in output


def test_another_number_of_processes_than_shards_allow(tmp: Path) -> None:
    World(tmp, "thirds", 1, "data.batch_size=12", "data.shards=2").until(6).kill().wait()
    overrides = ("data.batch_size=12", "data.shards=null")
    output = finish(tmp, "thirds", 3, *overrides).output(0)
    assert "same samples" in output
    assert "data.shards: 2 -> 3" in output
    steps = [row[0] for row in losses(tmp, "thirds") if row[1]]
    assert sorted(map(int, steps)) == [*range(1, 13)]


def test_a_process_that_has_no_equal_part_stands_by(tmp: Path) -> None:
    """Of three processes on four shards two train, whatever happens to which of them."""
    world = World(tmp, "spare", 3).until(4).kill(0)
    codes = world.wait()
    assert codes[0] == -signal.SIGKILL
    assert codes[2] == 1
    world = World(tmp, "spare", 3).until(7).kill(number=signal.SIGTERM)
    assert world.wait() == [75, 75, 75]
    world = finish(tmp, "spare", 3)
    assert "2 processes (1 stands by: there is no equal part of data.shards=4" in world.output(0)
    assert "(bitwise" in world.output(0)
    assert world.output(2) == ""
    assert differences(tmp, "one", "spare") == []


def test_a_refusal_ends_those_that_stand_by_too(tmp: Path) -> None:
    assert World(tmp, "spare", 3, "trainer.max_steps=14", "seed=5").wait() == [2, 75, 2]


def test_one_trains_where_a_batch_has_no_equal_parts(tmp: Path) -> None:
    world = finish(tmp, "alone", 3, "data.shards=1")
    assert "(2 stand by: there is no equal part of data.shards=1" in world.output(0)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_signal_to_one_of_two_saves_and_stops_both(tmp: Path, rank: int) -> None:
    name = f"told-{rank}"
    world = World(tmp, name, 2).until(5).kill(rank, number=signal.SIGTERM)
    assert world.wait() == [75, 75]
    assert "SIGTERM: saved step" in world.output(0)
    assert world.output(1) == ""
    assert "(bitwise" in finish(tmp, name, 2).output(0)
    assert differences(tmp, "one", name) == []


def test_the_death_of_one_ends_the_other(tmp: Path) -> None:
    world = World(tmp, "half", 2).until(5).kill(1)
    assert world.wait() == [1, -signal.SIGKILL]
    assert "Traceback" not in world.output()
    finish(tmp, "half", 2)
    assert differences(tmp, "one", "half") == []


def test_the_second_start_of_a_run_that_lives_is_refused_in_a_line(tmp: Path) -> None:
    first = World(tmp, "twice", 2, "trainer.max_steps=100000").until(2)
    second = World(tmp, "twice", 2)
    codes = second.wait()
    first.kill().wait()
    assert codes[0] == 2
    assert second.output().count("is in use by process") == 1


def test_a_run_that_lost_its_lock_stops_at_its_next_save(tmp: Path) -> None:
    first = World(tmp, "lost", 1, "trainer.max_steps=100000").until(2)
    (first.home / ".lock").unlink()  # as a file server does after it waited for a machine
    second = World(tmp, "lost", 1, "trainer.max_steps=100000")
    assert first.wait() == [1]
    said = (first.home / "attempts" / "001" / "log.txt").read_text()
    assert f"failed: the lock of {first.home} is lost" in said
    second.until(12).kill().wait()
    finish(tmp, "lost", 1, f"trainer.max_steps={second.store.steps()[-1] + 1}")


@pytest.mark.slow
@pytest.mark.parametrize("base", [SHARDED, SHARDED_UNET], ids=["dit", "unet"])
def test_every_pair_of_worlds(tmp: Path, base: list[str], request: pytest.FixtureRequest) -> None:
    kind = request.node.callspec.id
    finish(tmp, f"{kind}-straight", 1, base=base)
    for a in (1, 2, 4):
        for b in (1, 2, 4):
            name = f"{kind}-{a}-{b}"
            World(tmp, name, a, base=base).until(7).kill().wait()
            finish(tmp, name, b, base=base)
            assert differences(tmp, f"{kind}-straight", name) == [], name


def final(tmp: Path, name: str) -> dict[str, torch.Tensor]:
    store = Store(tmp / "runs" / name / "checkpoints")
    return load_state(store.state(store.steps()[-1]))["state_dict"]
