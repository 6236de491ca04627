"""Every kind of damage to every file: always noticed, never loaded, and the checkpoint before it is
used.
"""

import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import time
from contextlib import suppress

import pytest
import torch

from exact_resume.checkpoint import store as store_module
from exact_resume.checkpoint.store import (
    MANIFEST,
    STATE,
    CorruptCheckpointError,
    NoValidCheckpointError,
    Store,
    load_state,
)
from exact_resume.checkpoint.writer import StoreCheckpointIO
from exact_resume.fingerprint import fingerprint
from exact_resume.resume import ResumeRefusedError, Rules, check_compatibility, resolve_checkpoint
from sturdy.training.init_from import find_source, init_from

CONFIG = {"seed": 0, "trainer": {"deterministic": True, "threads": 1}}


pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")


def state(step):
    rng = torch.Generator().manual_seed(step)
    weights = {name: torch.randn(60, generator=rng) for name in ("conv.weight", "conv.bias")}
    return {
        "global_step": step,
        "state_dict": weights,
        "epoch": 0,
        "loops": {"fit": {"step": step}},
    }


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("pristine") / "checkpoints")
    for step in (3, 6, 9):
        store.commit(
            step,
            state(step),
            position=8 * step,
            fingerprint=fingerprint(CONFIG, "digest").as_dict(),
        )
    return store


@pytest.fixture
def store(pristine, tmp_path):
    """A copy to be damaged; whoever hangs on it is stopped."""
    shutil.copytree(pristine.directory, tmp_path / "checkpoints")
    before = signal.signal(signal.SIGALRM, hung)
    signal.alarm(10)
    yield Store(tmp_path / "checkpoints")
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def hung(*_):
    raise TimeoutError("it waits for something that will never come")


def falls_back(store, step, broken):
    """Whether the run is entered at ``step``, with what was written there, and all of ``broken``
    are put aside.
    """
    entry = resolve_checkpoint(store, "auto", {}, "min")
    found = load_state(entry.state)
    aside = {int(p.name[5:13]) for p in (store.directory / "quarantine").glob("*.reason.txt")}
    same = all(torch.equal(v, found["state_dict"][k]) for k, v in state(step)["state_dict"].items())
    return entry.step == found["global_step"] == step and same and aside == set(broken)


def flipped(data, bit):
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def bits(data, rng):
    """Some of each region of a file: its first and last bytes, where headers are, and all over
    it.
    """
    size = 8 * len(data)
    for low, high, n in ((0, 800, 60), (size - 3200, size, 120), (0, size, 180)):
        yield from rng.sample(range(max(0, low), min(size, high)), n)


def test_every_flipped_bit_of_the_state_is_noticed(store):
    path, rng, silent = store.state(9), random.Random(0), 0
    data = path.read_bytes()
    names = [
        b"PK\x03\x04",
        b"PK\x01\x02",
        b"PK\x05\x06",
    ]  # local headers, central directory, its end
    places = {8 * (data.index(name) + k) + k % 8 for name in names for k in range(22)}
    for bit in places | set(bits(data, rng)):
        path.write_bytes(flipped(data, bit))
        with pytest.raises(CorruptCheckpointError, match=r"state\.ckpt has changed"):
            store.verify(9)
        with pytest.raises(CorruptCheckpointError, match=r"state\.ckpt does not verify"):
            load_state(path)
        with suppress(Exception):
            silent += torch.load(path, weights_only=True).get("global_step") == 9
    assert silent > 50, "control: PyTorch alone would have loaded many of them"
    assert falls_back(store, 6, [9])


def test_every_flipped_bit_of_the_manifest_is_noticed_or_means_the_same(store):
    path, rng = store.path(9) / MANIFEST, random.Random(1)
    data, manifest, noticed = path.read_bytes(), store.verify(9), 0
    chosen = rng.sample(range(8 * len(data)), 300)
    for bit in chosen:
        path.write_bytes(flipped(data, bit))
        try:
            assert store.verify(9) == manifest  # the last digit of a time, maybe
        except CorruptCheckpointError:
            noticed += 1
    assert noticed > 0.98 * len(chosen)
    path.write_bytes(flipped(data, chosen[0]))
    assert falls_back(store, 6, [9])


@pytest.mark.parametrize("length", [0, 0.5, -1])
@pytest.mark.parametrize("name", [STATE, MANIFEST])
def test_a_file_that_is_cut_short(name, length, store):
    path = store.path(9) / name
    size = path.stat().st_size
    os.truncate(path, size - 1 if length == -1 else int(size * length))
    assert falls_back(store, 6, [9])


def remove(path):
    path.unlink()


def directory(path):
    path.unlink()
    path.mkdir()


def dangling(path):
    path.unlink()
    path.symlink_to("nowhere")


def in_a_circle(path):
    path.unlink()
    path.symlink_to(path.name)


def fifo(path):
    path.unlink()
    os.mkfifo(path)


def endless(path):
    path.unlink()
    path.symlink_to("/dev/zero")


def zeros(path):
    path.write_bytes(bytes(path.stat().st_size))


def longer(path):
    with path.open("ab") as file:
        file.write(b"\n\0")


def a_pickle(path):
    path.write_bytes(pickle.dumps(Malicious("executed")))


REPLACED = [remove, directory, dangling, in_a_circle, fifo, endless, zeros, longer, a_pickle]


@pytest.mark.parametrize("replace", REPLACED, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", [STATE, MANIFEST])
def test_a_file_that_is_missing_or_something_else(name, replace, store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    replace(store.path(9) / name)
    assert falls_back(store, 6, [9])
    assert not (tmp_path / "executed").exists()


def swap(a, b):
    aside = a.with_name("aside")
    a.rename(aside)
    b.rename(a)
    aside.rename(b)


@pytest.mark.parametrize("name", [STATE, MANIFEST, ""])
def test_files_or_checkpoints_that_have_changed_places(name, store):
    swap(store.path(6) / name, store.path(9) / name)
    assert falls_back(store, 3, [6, 9])


def test_another_checkpoint_under_the_name_of_a_newer_step(store):
    shutil.copytree(store.path(3), store.path(12))
    store.path(15).symlink_to(store.path(3))
    assert falls_back(store, 9, [12, 15])
    assert store.verify(3), "the link was moved, and not what it points to"


def test_all_broken_each_in_its_way_is_no_fresh_start(store):
    for step, replace in zip(store.steps(), (zeros, remove, directory), strict=True):
        replace(store.state(step))
    with pytest.raises(NoValidCheckpointError):
        resolve_checkpoint(store, "auto", {}, "min")


def test_strays_and_times_to_come_change_nothing(store):
    for path in (
        store.directory / "step-00000012",
        store.directory / "notes.txt",
        store.path(9) / "notes.txt",
    ):
        path.write_text("not a checkpoint")
    (store.directory / "step-00000015").mkdir()
    (store.directory / "step-00000015").rename(store.directory / "step-15")
    os.mkfifo(store.directory / "step-00000018")
    for path in store.path(3).iterdir():
        os.utime(path, (time.time() + 10**7,) * 2)
    os.utime(store.path(3), (time.time() + 10**7,) * 2)
    assert falls_back(store, 9, [])
    store.remove_stale_temp()
    store.prune({3, 6})
    assert store.steps() == [3, 6, 9]
    assert (store.path(9) / "notes.txt").exists()


class Malicious:
    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, "w")


def legacy(value, path):
    torch.save(value, path, _use_new_zipfile_serialization=False)


def plain(value, path):
    path.write_bytes(pickle.dumps(value))


@pytest.mark.parametrize("save", [torch.save, legacy, plain], ids=["zip", "legacy", "plain"])
def test_a_pickle_that_runs_code_is_not_run_though_its_manifest_vouches_for_it(
    save, store, tmp_path
):
    touched = tmp_path / "executed"
    weights = {"ema.model.w": torch.zeros(1)}
    save({"global_step": 9, "state_dict": weights, "x": Malicious(touched)}, store.state(9))
    reseal(store, 9)
    entry = resolve_checkpoint(store, "auto", {}, "min")
    assert entry.step == 9, "whoever can write the one can write the other"
    with pytest.raises(
        ValueError, match=r"state\.ckpt is broken, or holds more than tensors and primitives"
    ):
        StoreCheckpointIO(store, lambda _: {}).load_checkpoint(entry.state, weights_only=False)
    module = torch.nn.Module()
    for path in (store.path(9), store.state(9)):
        with pytest.raises(
            ValueError, match=r"state\.ckpt is broken, or holds more than tensors and primitives"
        ):
            init_from(module, find_source(str(path), tmp_path))
    assert not touched.exists()
    with store.state(9).open("rb") as file:
        pickle.load(file) if save is plain else torch.load(file, weights_only=False)
    assert touched.exists(), "the pickle is a dud"


def reseal(store, step, change=lambda manifest: None):
    """Let the manifest be as if it had been written like this."""
    path = store.path(step) / MANIFEST
    manifest = json.loads(path.read_bytes())
    del manifest["sha256"]
    data = store.state(step).read_bytes()
    manifest["files"] = {STATE: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
    change(manifest)
    path.write_bytes(
        json.dumps(manifest | {"sha256": store_module.manifest_hash(manifest)}, indent=1).encode()
    )


# Manifests of an older version of ours, or of a newer one: said plainly, and never a KeyError.


@pytest.mark.parametrize("key", ["format", "step", "files"])
def test_a_manifest_without_what_verifying_needs_does_not_verify(key, store):
    reseal(store, 9, lambda manifest: manifest.pop(key))
    with pytest.raises(CorruptCheckpointError, match=f"manifest.json cannot be read.*{key}"):
        store.verify(9)
    assert falls_back(store, 6, [9])


def test_what_is_not_known_here_is_no_hindrance(store):
    reseal(
        store,
        9,
        lambda manifest: manifest.update(
            colour="red", fingerprint=manifest["fingerprint"] | {"new": 1}
        ),
    )
    entry = resolve_checkpoint(store, "auto", {}, "min")
    assert check_compatibility(entry, fingerprint(CONFIG, "digest"), Rules()).level == "bitwise"


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("config", "seed: nothing -> 0"),
        ("data", "the data changed: digest nothing -> digest"),
        (None, "fingerprint"),
    ],
)
def test_a_fingerprint_without_its_trajectory_is_refused_unless_named_on_purpose(
    key, reason, store
):
    def change(manifest):
        manifest.pop("fingerprint") if key is None else manifest["fingerprint"].pop(key)

    reseal(store, 9, change)
    now = fingerprint(CONFIG, "digest")
    with pytest.raises(ResumeRefusedError) as error:
        check_compatibility(resolve_checkpoint(store, "auto", {}, "min"), now, Rules())
    assert reason in str(error.value)
    assert "ckpt_path=last" in str(error.value)
    guarantee = check_compatibility(resolve_checkpoint(store, "last", {}, "min"), now, Rules())
    assert guarantee.level == "refused"
    assert any(reason in line for line in guarantee.reasons)


def test_a_fingerprint_without_its_stack_promises_the_same_samples(store):
    reseal(store, 9, lambda manifest: manifest["fingerprint"].pop("stack"))
    entry = resolve_checkpoint(store, "auto", {}, "min")
    guarantee = check_compatibility(entry, fingerprint(CONFIG, "digest"), Rules())
    assert guarantee.level == "same samples"
    assert f"torch: nothing -> {torch.__version__}" in guarantee.reasons
