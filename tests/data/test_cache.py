import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from sturdy.data.cache import Cache, TooManyBroken, open_cache, quarantine_table
from sturdy.data.decode import Broken
from sturdy.data.folder import Folder

fork = multiprocessing.get_context("fork")


@pytest.fixture
def photos(tmp_path):
    """Twenty files each of two classes, one in three a PNG."""
    rng = np.random.default_rng(0)
    for k in range(40):
        path = tmp_path / "photos" / ("car" if k % 2 else "truck") / f"{k:02d}.{'jpg' if k % 3 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        x = rng.integers(0, 256, (6, 6 + k % 5, 3), dtype=np.uint8)
        Image.fromarray(x).resize((16 * x.shape[1], 96)).save(path)
    return tmp_path / "photos"


class Noise:
    """A source without files; every ``broken``-th image is broken."""

    classes = ("even", "odd")

    def __init__(self, n=30, shape=(3, 8, 8), broken=0, key="noise"):
        self.n, self.shape, self.broken, self.key = n, shape, broken, key

    def __len__(self):
        return self.n

    def label(self, index):
        return index % 2

    def name(self, index):
        return f"noise {index}"

    def decode(self, index):
        if self.broken and index % self.broken == 0:
            raise Broken("on purpose")
        return np.random.default_rng(index).integers(0, 256, self.shape, dtype=np.uint8)


class Slow(Noise):
    """Tells of every decode by a byte in a file, and takes its time."""

    def __init__(self, path, **options):
        super().__init__(**options)
        self.path = path

    def decode(self, index):
        with open(self.path, "ab", buffering=0) as file:
            file.write(b".")
        time.sleep(0.01)
        return super().decode(index)


def only_the_cache(root):
    """What a finished build leaves: one folder and its lock."""
    found = sorted(os.listdir(root))
    return len(found) == 2 and found[1] == found[0] + ".lock"


def content(cache):
    return [cache.image(i).tobytes() for i in range(len(cache))], cache.labels.tolist(), cache.digest


def test_holds_what_the_source_gives(photos, tmp_path):
    folder = Folder(root=photos, size=24)
    told = []
    cache = open_cache(folder, root=tmp_path / "cache", progress=lambda done, total: told.append((done, total)))
    assert cache.uniform
    assert len(cache) == len(folder) == 40
    assert cache.classes == ("car", "truck")
    for i in range(40):
        assert np.array_equal(cache.image(i), folder.decode(i))
        assert (cache.labels[i], cache.name(i)) == (folder.label(i), folder.name(i))
    indices = np.array([3, 3, 39, 0])
    batch = cache.gather(indices)
    assert (batch.shape, batch.dtype) == ((4, 3, 24, 24), np.uint8)
    assert all(np.array_equal(x, cache.image(i)) for x, i in zip(batch, indices, strict=True))
    assert told[-1] == (40, 40)
    assert quarantine_table(cache) == ""
    assert only_the_cache(tmp_path / "cache")
    with pytest.raises(ValueError, match="read-only"):
        cache.image(0)[:] = 0


def test_ragged(photos, tmp_path):
    folder = Folder(root=photos, size=24, crop="random")
    cache = open_cache(folder, root=tmp_path / "cache")
    assert not cache.uniform
    assert all(np.array_equal(cache.image(i), folder.decode(i)) for i in range(40))
    assert np.array_equal(cache.image(-1), folder.decode(39))
    with pytest.raises(ValueError, match="crop"):
        cache.gather(np.array([0]))
    with pytest.raises(IndexError):
        cache.image(40)


def test_the_number_of_workers_changes_nothing(photos, tmp_path):
    (photos / "car/01.jpg").write_bytes(b"")
    source = Folder(root=photos, size=24, crop="random")
    one, *others = [
        open_cache(source, root=tmp_path / str(workers), workers=workers, max_broken=0.1) for workers in (0, 1, 3)
    ]
    for other in others:
        assert content(other) == content(one)
        assert other.quarantine == one.quarantine == [("car/01.jpg", "empty")]


def test_a_second_start_reads_what_is_there(tmp_path):
    source = Slow(tmp_path / "decoded")
    first = open_cache(source, root=tmp_path / "cache")
    again = open_cache(source, root=tmp_path / "cache")
    assert (tmp_path / "decoded").stat().st_size == 30
    assert content(again) == content(first)


def test_a_changed_file_is_decoded_again(photos, tmp_path):
    first = open_cache(Folder(root=photos, size=24), root=tmp_path / "cache")
    Image.new("RGB", (30, 30), (1, 2, 3)).save(photos / "car/03.png")
    second = open_cache(Folder(root=photos, size=24), root=tmp_path / "cache")
    third = open_cache(Folder(root=photos, size=25), root=tmp_path / "cache")
    assert len({first.path, second.path, third.path}) == 3
    assert len({first.digest, second.digest, third.digest}) == 3


def test_digest_is_of_the_content_alone(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "copy")
    here, there = Folder(root=photos, size=24), Folder(root=tmp_path / "copy", size=24)
    assert here.key != there.key
    digest = open_cache(here, root=tmp_path / "cache").digest
    assert open_cache(there, root=tmp_path / "cache").digest == digest
    (tmp_path / "copy/car").rename(tmp_path / "copy/bus")  # same order, another class
    assert open_cache(Folder(root=tmp_path / "copy", size=24), root=tmp_path / "cache").digest != digest


def test_broken_images_are_left_out_with_a_reason(photos, tmp_path):
    (photos / "car/01.jpg").write_bytes((photos / "car/01.jpg").read_bytes()[:400])
    (photos / "truck/02.jpg").write_text("hello")
    (photos / "truck/zz.png").symlink_to("nowhere")
    folder = Folder(root=photos, size=24)
    with pytest.raises(TooManyBroken, match=r"3 of 41 images \(7.32%\).*data.max_broken=0.01") as error:
        open_cache(folder, root=tmp_path / "cache")
    assert "truck/zz.png  dangling link" in str(error.value)
    assert [name for name in os.listdir(tmp_path / "cache") if not name.endswith(".lock")] == []
    cache = open_cache(folder, root=tmp_path / "cache", max_broken=0.1)
    assert len(cache) == len(cache.labels) == 38
    assert [name for name, _ in cache.quarantine] == ["car/01.jpg", "truck/02.jpg", "truck/zz.png"]
    assert [why for _, why in cache.quarantine][1:] == [
        "not a JPEG, PNG, WebP, BMP, GIF or TIFF image",
        "dangling link",
    ]
    table = quarantine_table(cache, most=2)
    assert table.splitlines()[0] == "3 of 41 images are left out:"
    assert table.splitlines()[-1] == "  ... and 1 more"
    assert cache.name(0) == "car/03.png"
    with pytest.raises(TooManyBroken):  # a cache that is there is judged too
        open_cache(folder, root=tmp_path / "cache", max_broken=0.01)


def test_all_broken_is_an_error_always(tmp_path):
    with pytest.raises(TooManyBroken, match="all 30 images are broken"):
        open_cache(Noise(broken=1), root=tmp_path, max_broken=1.0)
    assert len(open_cache(Noise(broken=2, key="half"), root=tmp_path, max_broken=0.5)) == 15


def test_errors_of_a_source_leave_nothing(tmp_path):
    for options in ({"shape": (8, 8, 3)}, {"n": 0}):
        with pytest.raises((TypeError, ValueError)):
            open_cache(Noise(**options), root=tmp_path)
        assert [name for name in os.listdir(tmp_path) if not name.endswith(".lock")] == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: os.truncate(path / "images.bin", 1000),
        lambda path: os.truncate(path / "labels.npy", 100),
        lambda path: (path / "shapes.npy").unlink(),
        lambda path: (path / "manifest.json").unlink(),
        lambda path: os.truncate(path / "manifest.json", 50),
        lambda path: (path / "manifest.json").write_text((path / "manifest.json").read_text().replace("odd", "old")),
        lambda path: (path / "manifest.json").write_text("[]"),
    ],
)
def test_damage_is_noticed_and_mended(tmp_path, damage):
    cache = open_cache(Noise(), root=tmp_path)
    expected = content(cache)
    damage(cache.path)
    assert content(open_cache(Noise(), root=tmp_path)) == expected
    assert only_the_cache(tmp_path)


def test_pickles_as_its_path_and_opens_in_a_new_process(tmp_path):
    cache = open_cache(Noise(200), root=tmp_path)
    assert len(pickle.dumps(cache)) < 500
    program = """if True:
        import pickle, sys
        cache = pickle.load(sys.stdin.buffer)
        print(cache.gather([5, 7]).sum(), cache.name(3), cache.digest)
    """
    found = subprocess.run([sys.executable, "-c", program], input=pickle.dumps(cache), capture_output=True, check=True)
    assert found.stdout.decode().strip() == f"{cache.gather([5, 7]).sum()} noise 3 {cache.digest}"
    with fork.Pool(2) as pool:
        assert pool.map(cache.gather, [[1], [2]])[1].tobytes() == cache.image(2).tobytes()


def test_two_processes_at_once_make_one_cache(tmp_path):
    source = Slow(tmp_path / "decoded", n=40)
    with fork.Pool(3) as pool:
        opened = [pool.apply_async(open_cache, (source,), {"root": tmp_path / "cache"}) for _ in range(3)]
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
    for round in range(16):
        child = fork.Process(target=open_cache, args=(source,), kwargs={"root": root, "workers": workers})
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
        interrupted += any(name.endswith(".building") for name in os.listdir(root)) if root.exists() else 0
        for name in done:  # what is there is whole
            assert content(Cache(root / name)) == expected
            shutil.rmtree(root / name)
    assert interrupted  # the control: some kills fell into a build
    assert content(open_cache(source, root=root, workers=workers)) == expected
    assert only_the_cache(root)


def test_an_interrupted_parent_leaves_no_workers_and_no_files(tmp_path):
    source, root = Slow(tmp_path / "decoded", n=2000), tmp_path / "cache"
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
    assert (tmp_path / "decoded").stat().st_size == size < 2000


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
    assert "paths.cache" in message
    assert all(name.endswith(".lock") for name in os.listdir(tmp_path))


def test_manifest_is_plain_json(tmp_path):
    cache = open_cache(Noise(9, broken=4), root=tmp_path, max_broken=0.5)
    manifest = json.loads((cache.path / "manifest.json").read_text())
    assert manifest["classes"] == ["even", "odd"]
    assert (manifest["n"], manifest["shape"]) == (6, [3, 8, 8])
    assert manifest["quarantine"] == [[f"noise {k}", "on purpose"] for k in (0, 4, 8)]
    assert manifest["digest"] == cache.digest
