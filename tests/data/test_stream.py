"""Images in shards: the batches of a folder of the same images, or an error."""

import io
import json
import os
import pickle
import shutil
import signal
import tarfile
import time
from unittest.mock import ANY

import numpy as np
import pytest
from PIL import Image
from test_datamodule import Steps, batches, equal

from sturdy.data.cache import TooManyBrokenError
from sturdy.data.datamodule import folder_data
from sturdy.data.folder import Folder
from sturdy.data.shard_index import INDEX, Names, ShardIndex
from sturdy.data.shard_source import Shards
from sturdy.data.shard_store import ShardChangedError, ShardStore
from sturdy.data.shards import main
from sturdy.data.sides import changes_since
from sturdy.data.stream import StreamData

pytest.importorskip("webdataset", reason="the extra stream is not installed")
OPTIONS = {"image_size": 16, "batch_size": 8, "flip": True, "holdout": 0.2, "split": "content"}


def draw(path, k):
    """A small image of any proportions, as PNG or JPEG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (20 + k % 7, 18 + k % 11, 3)
    x = np.random.default_rng(k).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(x).save(path)


@pytest.fixture
def photos(tmp_path):
    """Forty images in two classes, with captions."""
    for k in range(40):
        path = tmp_path / "photos" / "ab"[k % 2] / f"{k:02d}.{'png' if k % 3 else 'jpg'}"
        draw(path, k)
        path.with_suffix(".txt").write_text(f"image {k // 4}" if k > 5 else "")
    return tmp_path / "photos"


@pytest.fixture
def shards(photos, tmp_path):
    """These images in five shards."""
    return make_shards(photos, tmp_path / "shards")


def make_shards(photos, out, *words):
    assert main(["pack", str(photos), str(out), "per_shard=8", *words]) == 0
    return out


def opened(kind, root, expected_digest=None, **options):
    data = kind(root=str(root), cache=root.parent / "cache", **(OPTIONS | options))
    data.trainer = Steps()
    data.open(expected_digest)
    return data


def stream(data):
    """All that training sees of the data in three epochs, and validation."""
    return [*batches(data, 13), *data.val_dataloader()]


def cache_bytes(root):
    return sum(file.stat().st_size for file in (root.parent / "cache").glob("*/*"))


# --- The same batches


@pytest.mark.parametrize("split", ["content", "count"])
@pytest.mark.parametrize("crop", ["center", "random"])
def test_batches_are_those_of_the_folder(photos, shards, crop, split):
    folder = opened(folder_data, photos, crop=crop, split=split)
    streamed = opened(StreamData, shards, crop=crop, split=split)
    assert equal(stream(streamed), stream(folder))
    assert streamed.classes == folder.classes == ("a", "b")
    assert streamed.prior == folder.prior
    assert [*streamed.cache.names] == [*folder.cache.names]
    assert np.array_equal(streamed.cache.contents, folder.cache.contents)
    assert np.array_equal(streamed.cache.shapes, folder.cache.shapes)


@pytest.mark.parametrize("options", [{"fold": 2, "folds": 3}, {"balance": 1.0}, {"augment": 0.5}])
def test_folds_balance_and_augmentation_are_those_of_the_folder(photos, shards, options):
    folder, streamed = opened(folder_data, photos, **options), opened(StreamData, shards, **options)
    assert equal(stream(streamed), stream(folder))


def test_captions_are_those_of_the_folder(photos, tmp_path):
    shards = make_shards(photos, tmp_path / "captioned", "captions=true")
    folder = opened(folder_data, photos, captions=True)
    streamed = opened(StreamData, shards, captions=True)
    assert streamed.captions == folder.captions
    assert len(folder.captions) == 9
    assert equal(stream(streamed), stream(folder))
    uncaptioned = opened(StreamData, shards)
    assert uncaptioned.captions == []
    assert "captions=true would use 9 captions" in uncaptioned.summary_lines()


def test_images_left_out_are_those_of_the_folder(photos, tmp_path):
    (photos / "a/00.jpg").write_bytes((photos / "a/00.jpg").read_bytes()[:-40])
    (photos / "b/zz.png").symlink_to("nowhere")
    (photos / "c").mkdir()
    (photos / "c/text.jpg").write_text("no image")  # a class without an image
    shards = make_shards(photos, tmp_path / "shards")
    options = {"max_broken": 3, "min_side": 21}
    folder, streamed = (
        opened(kind, root, **options)
        for kind, root in ((folder_data, photos), (StreamData, shards))
    )
    assert dict(streamed.cache.quarantine) == dict(folder.cache.quarantine)
    assert dict(folder.cache.quarantine).keys() == {"a/00.jpg", "b/zz.png", "c/text.jpg"}
    assert streamed.cache.small == folder.cache.small
    assert len(folder.cache.small) > 5
    assert streamed.classes == folder.classes == ("a", "b", "c")
    assert equal(stream(streamed), stream(folder))
    large = opened(StreamData, shards, image_size=24, max_broken=3)
    scaled_up = opened(folder_data, photos, image_size=24, max_broken=3).cache.unusual[0]
    assert large.cache.unusual[0] == scaled_up.partition("; min_side")[0]
    with pytest.raises(TooManyBrokenError, match=r"3 of 42 images"):
        opened(StreamData, shards, max_broken=2)


@pytest.mark.processes  # data workers
def test_workers_and_the_step_of_entry_change_nothing(photos, shards):
    expected = batches(opened(folder_data, photos), 12)
    for workers in (0, 2):
        streamed = opened(StreamData, shards, num_workers=workers)
        assert equal(batches(streamed, 12), expected)
        streamed.load_state_dict({"step": 0, "position": 5 * 8})
        assert equal(batches(streamed, 7), expected[5:])


def test_a_copy_that_was_sent_to_another_process_reads_the_same(shards):
    cache = opened(StreamData, shards).cache
    copy = pickle.loads(pickle.dumps(cache))
    for one, other in zip(copy.images([3, 1]), cache.images([3, 1]), strict=True):
        assert np.array_equal(one, other)


def test_control_shards_in_another_order_are_another_order(photos, shards):
    expected = stream(opened(folder_data, photos, split="count"))
    (shards / "000000.tar").rename(shards / "x.tar")
    assert main(["index", str(shards)]) == 0
    moved = opened(StreamData, shards, split="count")
    assert not equal(stream(moved), expected)


def test_control_the_order_of_webdataset_depends_on_the_workers_and_on_luck(shards):
    """Its own pipeline reads shards from end to end, which is why we read single images."""
    from torch.utils.data import DataLoader
    from webdataset import WebDataset

    def order(workers, **options):
        paths = [str(path) for path in sorted(shards.glob("*.tar"))]
        samples = WebDataset(paths, **options).shuffle(10)
        loader = DataLoader(samples, batch_size=None, num_workers=workers)
        return [sample["__key__"] for sample in loader]

    orders = [order(workers, shardshuffle=5) for workers in (0, 0, 2)]
    assert all(sorted(one) == sorted(orders[0]) for one in orders)
    assert len({tuple(one) for one in orders}) == 3


# --- The disk


@pytest.mark.parametrize("size", [8, 64])
def test_the_disk_gets_a_list_of_the_images_and_no_pixel(photos, shards, size):
    before = {path: path.stat().st_mtime_ns for path in shards.rglob("*")}
    stream(opened(StreamData, shards, image_size=size, captions=False))
    assert cache_bytes(shards) < 4000 + 40 * 100
    assert not [*(shards.parent / "cache").glob("*/images.bin")]
    assert {path: path.stat().st_mtime_ns for path in shards.rglob("*")} == before
    opened(folder_data, photos, image_size=64)
    assert cache_bytes(shards) > 40 * 3 * 64 * 64  # control: what the folder needs


def test_names_of_many_images_are_two_arrays():
    names = ["a", "", "zoë/1.jpg", "b" * 300]
    found = Names.of(names)
    assert [*found] == names
    assert found[1:3] == names[1:3]
    assert [*found.take(np.array([3, 0, 2]))] == [names[3], names[0], names[2]]
    assert [*Names.join([found, Names.of([]), found])] == names * 2
    with pytest.raises(IndexError):
        found[4]


# --- Damage and change


def place_of(shards, name):
    """Shard, offset and size of an image."""
    index = ShardIndex.from_bytes((shards / INDEX).read_bytes())
    sample = index.samples[[*index.names].index(name)]
    return shards / index.shards[sample["shard"]].name, int(sample["offset"]), int(sample["size"])


def flip(shards, name):
    """Flip a bit in the middle of an image; the shard keeps its size."""
    shard, offset, size = place_of(shards, name)
    content = bytearray(shard.read_bytes())
    content[offset + size // 2] ^= 1
    shard.write_bytes(content)
    return shard.name


def test_a_damaged_image_is_an_error_that_names_it(photos, shards):
    streamed = opened(StreamData, shards)
    shard = flip(shards, "b/17.png")
    with pytest.raises(ShardChangedError, match=rf"b/17\.png in the shard {shard} is not what"):
        stream(streamed)


@pytest.mark.processes
def test_a_damaged_image_is_an_error_in_a_worker_too(photos, shards):
    streamed = opened(StreamData, shards, num_workers=2)
    flip(shards, "b/17.png")
    with pytest.raises(ShardChangedError, match=r"b/17\.png"):
        stream(streamed)


def test_control_without_the_hash_another_image_would_be_trained_on(shards, monkeypatch):
    streamed = opened(StreamData, shards)
    expected = stream(streamed)
    shard, offset, size = place_of(shards, "b/17.png")
    Image.new("RGB", (24, 24)).save(other := io.BytesIO(), "png")
    content = bytearray(shard.read_bytes())
    content[offset : offset + size] = other.getvalue().ljust(size, b"\0")
    shard.write_bytes(content)
    with pytest.raises(ShardChangedError):
        stream(streamed)
    monkeypatch.setattr("sturdy.data.streamed_images.hash_bytes", lambda content: ANY)
    assert not equal(stream(streamed), expected)


@pytest.mark.parametrize("what", ["gone", "cut", "no index", "damaged index", "no folder"])
def test_what_is_wrong_with_the_shards_is_said_at_the_start(shards, what):
    opened(StreamData, shards)
    shard = shards / "000002.tar"
    if what == "gone":
        shard.unlink()
    if what == "cut":
        os.truncate(shard, 4096)
    if what == "no index":
        (shards / INDEX).unlink()
    if what == "damaged index":
        content = bytearray((shards / INDEX).read_bytes())
        content[len(content) // 2] ^= 1
        (shards / INDEX).write_bytes(content)
    if what == "no folder":
        shutil.rmtree(shards)
    message = {
        "gone": "the shard 000002.tar is gone",
        "cut": "the shard 000002.tar has 4,096 bytes, and had",
        "no index": "has no index.npz: make one with",
        "damaged index": "index.npz is damaged",
        "no folder": "does not exist; the nearest folder that does is",
    }[what]
    with pytest.raises((ValueError, OSError), match=message) as caught:
        opened(StreamData, shards)
    assert str(caught.value).startswith("root=")


def test_a_run_goes_on_with_the_images_it_began_with_when_shards_are_added(shards, tmp_path):
    first = opened(StreamData, shards)
    expected = stream(first)
    draw(tmp_path / "more/a/new.png", 90)
    draw(tmp_path / "more/b/newer.png", 91)
    more = make_shards(tmp_path / "more", tmp_path / "added")
    (more / "000000.tar").rename(shards / "more-000000.tar")
    assert main(["index", str(shards)]) == 0
    again = opened(StreamData, shards, first.digest)
    assert again.notes == ["2 images are new, and not used (a/new.png, b/newer.png)"]
    assert equal(stream(again), expected)
    grown = opened(StreamData, shards)
    assert grown.digest != first.digest
    new, *_ = map(str, changes_since(grown, first.digest))
    assert new == "2 images are new (a/new.png, b/newer.png)"
    held = [
        set(d.cache.names[int(i)] for i in d.split.indices(range(d.held_out)))
        for d in (first, grown)
    ]
    assert held[0] <= held[1]


def test_a_changed_shard_is_another_set_whose_change_is_named(photos, shards, tmp_path):
    first = opened(StreamData, shards)
    draw(photos / "a/04.png", 99)
    changed = make_shards(photos, tmp_path / "changed")
    for path in changed.glob("0*.tar"):
        shutil.copy(path, shards)
    assert main(["index", str(shards)]) == 0
    again = opened(StreamData, shards, first.digest)
    assert again.digest != first.digest
    changed_image, *_ = map(str, changes_since(again, first.digest))
    assert changed_image == "1 image changed (a/04.png)"
    assert again.notes


def test_moved_shards_are_the_same_images(shards, tmp_path):
    first = opened(StreamData, shards)
    moved = shards.rename(tmp_path / "elsewhere")
    again = opened(StreamData, moved, first.digest)
    assert again.digest == first.digest
    assert again.notes == []


def test_other_pixels_of_the_same_files_are_another_set(shards, monkeypatch):
    import sturdy.data.streamed_images as module

    first = opened(StreamData, shards)
    real = module.decode_file

    def other_version(*args, **options):
        return real(*args, **options)._replace(pixels=real(*args, **options).pixels ^ 1)

    monkeypatch.setattr(module, "decode_file", other_version)
    monkeypatch.setattr("sturdy.data.shard_source.version", lambda name: "99")
    again = opened(StreamData, shards, first.digest)
    assert again.digest != first.digest
    assert again.notes == ["the packages that decode images give other pixels now"]


# --- Making shards


def test_shards_are_those_of_webdataset(photos, tmp_path):
    from webdataset import WebDataset

    shards = make_shards(photos, tmp_path / "shards", "captions=true")
    paths = [str(path) for path in sorted(shards.glob("*.tar"))]
    samples = [*WebDataset(paths, shardshuffle=False)]
    folder = Folder(root=photos, captions=True)
    assert len(samples) == 40
    for index, sample in enumerate(samples):
        name = folder.name(index)
        assert sample[name[-3:]] == (photos / name).read_bytes()
        assert json.loads(sample["json"]) == {"name": name, "class": name[0]}
        assert int(sample["cls"]) == "ab".index(name[0])
        assert sample["txt"].decode() == (*folder.captions, "")[folder.caption(index)]


def foreign_shard(path, samples):
    """Write a tar file by other means than ours."""
    with tarfile.open(path, "w") as tar:
        for name, content in samples:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def picture(k):
    """The bytes of a PNG."""
    x = np.random.default_rng(k).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(x).save(file := io.BytesIO(), "png")
    return file.getvalue()


def test_shards_of_others_are_read(tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    for number in range(2):
        files = []
        for k in range(12):
            files += [(f"{k:03}.PNG", picture(20 * number + k)), (f"{k:03}.cls", b"%d\n" % k)]
            files.append((f"{k:03}.json", json.dumps({"text": f"a  {k}", "kind": k % 2}).encode()))
            files.append((f"{k:03}.pyd", pickle.dumps(Bomb())))
        foreign_shard(shards / f"{number}.tar", files)
    assert main(["index", str(shards)]) == 0
    streamed = opened(StreamData, shards, captions=True)
    assert streamed.classes == tuple(str(k) for k in range(12))  # as numbers, not as texts
    assert sorted(streamed.captions) == sorted(f"a {k}" for k in range(12))
    assert streamed.cache.names[13] == "1.tar/001.png"
    assert len(stream(streamed)) > 13
    assert main(["index", str(shards), "label_column=kind", "caption_column=null"]) == 0
    again = opened(StreamData, shards)
    assert (again.classes, again.captions) == (("0", "1"), [])
    assert not Bomb.exploded


class Bomb:
    exploded = False

    def __reduce__(self):
        return setattr, (Bomb, "exploded", True)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([("0.jpg", b"x"), ("0.png", b"x")], "has several images (jpg, png): say which"),
        ([("0.png", picture(1)), ("0.cls", b"1"), ("1.png", picture(2))], "1.png has no class"),
        ([("0.png", picture(1)), ("0.txt", b"a"), ("1.png", picture(2))], "1.png has no caption"),
        ([("0.png", b"x"), ("0.png", b"y")], "duplicate file name"),
        (None, "t.tar is no tar file, or is compressed or damaged"),
        ("none", "has no shards: no .tar file"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_shards_is_said(tmp_path, capsys, files, message):
    if files is None:
        (tmp_path / "t.tar").write_bytes(b"\x1f\x8b" * 1000)
    elif files != "none":
        foreign_shard(tmp_path / "t.tar", files)
    assert main(["index", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / INDEX).exists()


def test_an_index_executes_nothing(shards):
    arrays = dict(np.load(shards / INDEX))
    arrays["samples"] = np.array([Bomb()], dtype=object)
    np.savez(shards / INDEX, **arrays)
    with pytest.raises(ValueError, match=r"index\.npz is damaged"):
        opened(StreamData, shards)
    assert not Bomb.exploded


@pytest.mark.parametrize("root", ["pipe:touch exploded", "/nowhere; touch exploded", "", None, 3])
def test_a_root_is_a_folder_or_a_url(tmp_path, monkeypatch, root):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match="root="):
        Shards(root=root)
    assert not [*tmp_path.iterdir()]


def test_a_url_holds_no_password():
    with pytest.raises(ValueError, match="must hold no password") as caught:
        ShardStore("s3://key:secret@bucket/shards")
    assert "secret" not in str(caught.value)


def test_any_url_of_fsspec_is_read(photos, shards):
    pytest.importorskip("fsspec")
    expected = stream(opened(folder_data, photos))
    url = StreamData(root=f"file://{shards}", cache=shards.parent / "cache", **OPTIONS)
    url.trainer = Steps()
    url.open()
    assert url.cache.stream.store.is_remote
    assert equal(stream(url), expected)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pack", "PHOTOS", "SHARDS", "per_shard=7"], "has shards of other images, or was made"),
        (["pack", "PHOTOS", "PHOTOS"], "is not empty"),
        (["pack", "PHOTOS", "NEW", "labelz=1"], "there is no option labelz="),
        (["pack", "PHOTOS", "NEW", "captions"], "is not of the form key=value"),
        (["pack", "PHOTOS", "NEW", "per_shard=0"], "per_shard=0 must be a whole number"),
        (["index", "NOWHERE"], "does not exist"),
    ],
)
def test_a_wrong_command_is_answered_in_a_line(photos, shards, capsys, words, message):
    names = {"PHOTOS": photos, "SHARDS": shards, "NEW": shards.parent / "new"}
    names["NOWHERE"] = shards / "no"
    before = sorted(photos.rglob("*"))
    assert main([str(names.get(word, word)) for word in words]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert sorted(photos.rglob("*")) == before


def pack_slowly(words):
    real = Folder.content
    Folder.content = lambda self, index: (time.sleep(0.01), real(self, index))[1]
    return main(words)


@pytest.mark.processes
def test_a_killed_pack_goes_on_and_ends_in_the_same_bytes(photos, shards, tmp_path):
    """Killed later and later, from before the first shard to after the last."""
    killed = tmp_path / "killed"
    words = ["pack", str(photos), str(killed), "per_shard=8"]
    found = []
    for attempt in range(40):
        process = os.fork()
        if not process:
            os._exit(pack_slowly(words))
        time.sleep(0.02 + 0.03 * attempt)
        os.kill(process, signal.SIGKILL)
        if os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0:
            break
        found.append(len([*killed.glob("0*.tar")]))
    assert len(found) >= 3
    assert any(0 < shards < 5 for shards in found)
    assert main(words) == 0
    for path in shards.glob("*.tar"):
        assert (tmp_path / "killed" / path.name).read_bytes() == path.read_bytes()
    indices = [
        ShardIndex.from_bytes((root / INDEX).read_bytes()) for root in (shards, tmp_path / "killed")
    ]
    assert np.array_equal(indices[0].samples, indices[1].samples)
    assert [*indices[0].names] == [*indices[1].names]
    assert not [*(tmp_path / "killed").glob(".*.tar")]


def test_only_new_shards_are_read_again(photos, shards, monkeypatch):
    read = []
    real = ShardStore.open
    monkeypatch.setattr(
        ShardStore, "open", lambda self, name: (read.append(name), real(self, name))[1]
    )
    foreign_shard(shards / "more.tar", [("0.png", picture(1)), ("0.cls", b"0")])
    assert main(["index", str(shards)]) == 2  # a number among names
    foreign_shard(shards / "more.tar", [("0.png", picture(1)), ("0.json", b'{"class": "c"}')])
    assert main(["index", str(shards)]) == 0
    assert read == ["more.tar", "more.tar"]
    assert opened(StreamData, shards).classes == ("a", "b", "c")
