"""Real files, real damage, real SIGKILL: what the store gives back is whole and true, or it is
refused.
"""

import json
import multiprocessing
import os
import random
import signal
import time

import pytest
import torch

from exact_resume.checkpoint import store as store_module
from exact_resume.checkpoint.store import (
    MANIFEST,
    STATE,
    CorruptCheckpointError,
    NoValidCheckpointError,
    Store,
    assert_primitive,
    load_state,
)
from exact_resume.resume import ResumeRefusedError, resolve_checkpoint
from sturdy.training.build import load_module

FORK = multiprocessing.get_context("fork")


def state(step):
    return {
        "global_step": step,
        "weights": torch.full((1000,), float(step)),
        "names": ["a", None, (1, 2.5, True)],
    }


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "checkpoints")
    for step in (3, 6, 9):
        store.commit(step, state(step), position=8 * step)
    return store


def test_a_checkpoint_of_a_newer_version_is_left_where_it_is(store):
    seal(store.path(9), format=99)
    with pytest.raises(
        NoValidCheckpointError, match="format 99, of a newer version; update the code"
    ):
        store.last()
    assert store.steps() == [3, 6, 9]


def test_what_is_committed_is_there_with_its_facts(store):
    assert store.steps() == [3, 6, 9]
    assert store.last()["step"] == 9
    assert store.verify(6)["position"] == 48
    assert torch.equal(load_state(store.state(6))["weights"], state(6)["weights"])
    assert sorted(p.name for p in store.path(6).iterdir()) == [MANIFEST, STATE]


def test_an_empty_store_has_no_last(tmp_path):
    assert Store(tmp_path / "nothing").last() is None


def test_checkpoints_are_immutable(store):
    with pytest.raises(FileExistsError, match="never overwritten"):
        store.commit(6, state(6))


def test_facts_verify_whatever_json_makes_of_them(store):
    store.commit(12, state(12), nested={10: "a", 9: [float("nan"), (1, 2)]}, name="ü\udcff")
    assert store.last()["step"] == 12


def truncate(path):
    os.truncate(path / STATE, (path / STATE).stat().st_size - 1)


def flip_a_bit(path):
    data = bytearray((path / STATE).read_bytes())
    data[len(data) // 2] ^= 1
    (path / STATE).write_bytes(data)


def edit(path, **changes):
    manifest = json.loads((path / MANIFEST).read_bytes()) | changes
    (path / MANIFEST).write_text(json.dumps(manifest))


def seal(path, **changes):
    manifest = json.loads((path / MANIFEST).read_bytes()) | changes
    del manifest["sha256"]
    (path / MANIFEST).write_text(
        json.dumps(manifest | {"sha256": store_module.manifest_hash(manifest)})
    )


DAMAGE = {
    "state cut short": (truncate, "state.ckpt has"),
    "a flipped bit": (flip_a_bit, "state.ckpt has changed"),
    "no state": (lambda path: (path / STATE).unlink(), "state.ckpt cannot be read"),
    "no manifest": (lambda path: (path / MANIFEST).unlink(), "manifest.json cannot be read"),
    "manifest cut short": (
        lambda path: os.truncate(path / MANIFEST, 100),
        "manifest.json cannot be read",
    ),
    "manifest of something else": (
        lambda path: (path / MANIFEST).write_text("[]"),
        "manifest.json cannot be read",
    ),
    "manifest edited": (lambda path: edit(path, position=0), "manifest.json has changed"),
    "of another step": (lambda path: seal(path, step=3), "belongs to step 3"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_does_not_verify_is_put_aside_with_its_reason_and_the_older_one_used(damage, store):
    inflict, reason = DAMAGE[damage]
    inflict(store.path(9))
    with pytest.raises(CorruptCheckpointError, match=reason):
        store.verify(9)
    assert store.last(quarantine=True)["step"] == 6
    assert store.steps() == [3, 6]
    (text,) = (store.directory / "quarantine").glob("step-00000009.*.reason.txt")
    assert reason in text.read_text()
    assert text.with_name(text.name.removesuffix(".reason.txt")).is_dir(), "nothing is deleted"


def test_where_none_verifies_there_is_no_fresh_start(store):
    for step in store.steps():
        flip_a_bit(store.path(step))
    for _ in range(2):  # the second time they are all in quarantine
        with pytest.raises(NoValidCheckpointError, match="quarantine"):
            resolve_checkpoint(store, "auto", {}, "min")


def test_foreign_names_are_no_checkpoints(store):
    for name in ("step-12", "step-000000012", "step-00000012.bak", "notes"):
        (store.directory / name).mkdir()
    (store.directory / "step-00000099").write_text("a file")
    (store.directory / "step-00000012").symlink_to("nowhere")
    assert store.steps() == [3, 6, 9]
    assert store.last()["step"] == 9
    store.prune(set())
    assert store.steps() == [9]


def test_prune_keeps_what_it_is_told_and_always_the_newest(store):
    store.prune({3})
    assert store.steps() == [3, 9]
    store.prune(set())
    assert store.steps() == [9]
    store.prune(set())
    assert [p.name for p in store.directory.iterdir()] == ["step-00000009"]


def test_abandoned_checkpoints_are_moved_whole(store, tmp_path):
    there = tmp_path / "abandoned" / "001"
    assert store.move_newer(3, there) == [9, 6]
    assert store.steps() == [3]
    assert Store(there).verify(9)["step"] == 9
    assert store.move_newer(3, tmp_path / "abandoned" / "002") == []
    assert not (tmp_path / "abandoned" / "002").exists()


def test_a_commit_that_fails_leaves_nothing(store):
    before = sorted(p.name for p in store.directory.iterdir())
    with pytest.raises(TypeError):
        store.commit(12, state(12), fact=object())  # refused by JSON, after the state was written
    assert sorted(p.name for p in store.directory.iterdir()) == before


def commit_for_ever(directory):
    store = Store(directory)
    for step in range(1, 10**6):
        store.commit(step, {"global_step": step, "weights": torch.full((500_000,), float(step))})
        store.prune(set(store.steps()[-2:]))


def test_sigkill_in_a_commit_leaves_only_whole_checkpoints(tmp_path):
    rng, strays, newest = random.Random(0), 0, []
    for trial in range(12):
        store = Store(tmp_path / str(trial))
        child = FORK.Process(target=commit_for_ever, args=(store.directory,))
        child.start()
        while child.is_alive() and not store.steps():
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.1))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        for step in store.steps():
            store.verify(step)
        last = store.last()
        newest.append(last["step"])
        weights = load_state(store.state(newest[-1]))["weights"]
        assert torch.equal(weights, torch.full((500_000,), float(newest[-1])))
        strays += sum(p.name.startswith(".") for p in store.directory.iterdir())
        store.remove_stale_temp()
        assert all(p.name.startswith("step-") for p in store.directory.iterdir())
        assert store.last() == last
    assert strays, "no kill fell into a commit"
    assert len(set(newest)) > 1


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ({"a": {"b": [1, object()]}}, "state['a']['b'][1] is a object"),
        ({"config": {"run": os.path}}, "state['config']['run'] is a module"),
        ({"f": torch.relu}, "state['f'] is a builtin"),
        ({(1, len): 0}, "a key of state[1] is a builtin"),
        ({"dtype": torch.float32}, "state['dtype'] is a dtype"),
    ],
)
def test_what_is_no_tensor_or_primitive_is_named(value, name, tmp_path):
    with pytest.raises(TypeError) as error:
        assert_primitive(value, "state")
    assert name in str(error.value)
    with pytest.raises(TypeError):
        Store(tmp_path).commit(1, value)
    assert Store(tmp_path).steps() == []


class Malicious:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def test_a_pickle_that_runs_code_is_refused_unexecuted(tmp_path):
    touched, path = tmp_path / "touched", tmp_path / "evil.ckpt"
    torch.save({"global_step": 1, "state_dict": {}, "config": {}, "x": Malicious(touched)}, path)
    with pytest.raises(ValueError, match="tensors and primitives"):
        load_state(path)
    with pytest.raises(ValueError, match="tensors and primitives"):
        load_module(path)
    with pytest.raises(ResumeRefusedError, match=r"cannot be loaded.*tensors and primitives"):
        resolve_checkpoint(Store(tmp_path / "checkpoints"), str(path), {}, "min")
    assert not touched.exists()
    torch.load(path, weights_only=False)
    assert touched.exists(), "the pickle is a dud"


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 cut short"])
def test_what_is_no_checkpoint_is_named(content, tmp_path):
    path = tmp_path / STATE
    path.write_bytes(content)
    with pytest.raises(ValueError, match=STATE):
        load_state(path)
