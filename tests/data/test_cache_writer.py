"""Writing a cache: in real processes that meet, are interrupted, killed, or find the disk full."""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time

import pytest
from image_files import Noise, Slow, content, only_the_cache

from sturdy.data.cache import Cache, open_cache
from sturdy.data.cache_writer import check_disk_space

fork = multiprocessing.get_context("fork")


def test_errors_of_a_source_leave_nothing(tmp_path):
    for options in ({"shape": (8, 8, 3)}, {"n": 0}):
        with pytest.raises((TypeError, ValueError)):
            open_cache(Noise(**options), root=tmp_path)
        assert [name for name in os.listdir(tmp_path) if not name.endswith(".lock")] == []


def test_two_processes_at_once_make_one_cache(tmp_path):
    source = Slow(tmp_path / "decoded", n=40)
    with fork.Pool(3) as pool:
        opened = [
            pool.apply_async(open_cache, (source,), {"root": tmp_path / "cache"}) for _ in range(3)
        ]
        digests = {cache.get().digest for cache in opened}
    assert len(digests) == 1
    assert (tmp_path / "decoded").stat().st_size == 40  # each image was decoded once
    assert only_the_cache(tmp_path / "cache")


@pytest.mark.parametrize("workers", [0, 2])
def test_sigkill_at_any_instant(tmp_path, workers):
    source, root = Noise(600, shape=(3, 64, 64)), tmp_path / "cache"
    started = time.monotonic()
    expected = content(open_cache(source, root=tmp_path / "whole", workers=workers))
    span = time.monotonic() - started
    instants, interrupted = random.Random(0), 0
    for round in range(12):
        child = fork.Process(
            target=open_cache, args=(source,), kwargs={"root": root, "workers": workers}
        )
        child.start()
        if round % 2:
            child.join(instants.uniform(0, span))
        else:  # around the rename
            while child.is_alive() and not list(root.glob("*.building/manifest.json")):
                pass
            time.sleep(instants.uniform(0, 0.004))
        child.kill()  # SIGKILL
        child.join()
        done = [name for name in os.listdir(root) if "." not in name] if root.exists() else []
        interrupted += (
            any(name.endswith(".building") for name in os.listdir(root)) if root.exists() else 0
        )
        for name in done:  # what is there is whole
            assert content(Cache(root / name)) == expected
            shutil.rmtree(root / name)
    assert interrupted  # the control: some kills fell into a build
    assert content(open_cache(source, root=root, workers=workers)) == expected
    assert only_the_cache(root)


def test_an_interrupted_parent_leaves_no_workers_and_no_files(tmp_path):
    source, root = Slow(tmp_path / "decoded", n=20_000), tmp_path / "cache"
    child = fork.Process(target=open_cache, args=(source,), kwargs={"root": root, "workers": 3})
    child.start()
    while not (tmp_path / "decoded").exists():
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGINT)
    child.join(20)
    assert child.exitcode not in (None, 0)
    assert [name for name in os.listdir(root) if not name.endswith(".lock")] == []
    size = (tmp_path / "decoded").stat().st_size
    time.sleep(0.1)
    assert (tmp_path / "decoded").stat().st_size == size < 20_000


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path):
    def attempt(queue):
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        try:
            open_cache(Noise(100, shape=(3, 64, 64)), root=tmp_path)
        except OSError as error:
            queue.put(str(error))

    queue = fork.SimpleQueue()
    child = fork.Process(target=attempt, args=(queue,))
    child.start()
    message = queue.get()
    child.join()
    assert "the disk is full after" in message
    assert "cache=" in message
    assert all(name.endswith(".lock") for name in os.listdir(tmp_path))


def test_manifest_is_plain_json(tmp_path):
    cache = open_cache(Noise(9, broken=4), root=tmp_path, max_broken=0.5)
    manifest = json.loads((cache.path / "manifest.json").read_text())
    assert manifest["classes"] == ["even", "odd"]
    assert (manifest["n"], manifest["channels"], manifest["dtype"]) == (6, 3, "uint8")
    assert manifest["quarantine"] == [[f"noise {k}", "on purpose"] for k in (0, 4, 8)]
    assert manifest["digest"] == cache.digest


def test_a_cache_that_does_not_fit_is_refused_before_it_is_written(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"cache=.* has room for .* GB, and the decoded images take 192,000\.0 GB",
    ):
        open_cache(Noise(10**12, shape=(3, 8, 8)), root=tmp_path)
    assert all(name.endswith(".lock") for name in os.listdir(tmp_path))


def test_a_large_cache_is_announced(tmp_path, caplog):
    check_disk_space(tmp_path, 10**9)
    assert caplog.text == ""
    check_disk_space(tmp_path, 10**9 + 10**8)
    assert f"the decoded images take 1.1 GB in {tmp_path}" in caplog.text


def test_where_no_cache_can_be_made_the_key_is_named(tmp_path):
    (tmp_path / "file").touch()
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        message = rf"cache={root} cannot be written .*choose another folder"
        with pytest.raises(OSError, match=message) as error:
            open_cache(Noise(), root=root)
        assert error.value.__cause__ is None  # which would be told instead
