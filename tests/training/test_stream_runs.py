"""Runs on images in shards end in the bits of a run on the folder: whatever the processes and the
data workers, and however often they are killed.
"""

import random
import shutil
import time

import numpy as np
import pytest
from PIL import Image

from runs import COMMON, differences, run_script
from sturdy.data.shards import main
from worlds import World, finish

pytest.importorskip("webdataset", reason="the extra stream is not installed")
TINY = [
    *(
        word
        for word in COMMON
        if not word.startswith(("data.source", "data.split", "data.holdout"))
    ),
    *("backbone=dit", "backbone.width=32", "backbone.depth=1", "backbone.heads=2"),
    *("data.shards=4", "reduction=tree", "data.crop=random", "data.flip=true"),
    *("trainer.max_steps=20", "callbacks.checkpoint.every_n_train_steps=2"),
]


@pytest.fixture(scope="module")
def tmp(tmp_path_factory):
    """Sixty images in a folder and in shards, and the run on the folder."""
    tmp = tmp_path_factory.mktemp("stream")
    for k in range(60):
        path = tmp / "photos" / "ab"[k % 2] / f"{k}.{'jpg' if k % 3 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        x = np.random.default_rng(k).integers(0, 256, (16 + k % 7, 20, 3), dtype=np.uint8)
        Image.fromarray(x).save(path)
    assert main(["pack", str(tmp / "photos"), str(tmp / "shards"), "per_shard=7"]) == 0
    finish(tmp, "folder", 1, base=[*TINY, "data=folder", f"data.root={tmp / 'photos'}"])
    return tmp


def streamed(tmp, shards="shards"):
    return [*TINY, "data=stream", f"data.root={tmp / shards}"]


def kill_and_finish(tmp, name, kills, starts):
    """Kill all processes of each start at a random moment after a checkpoint, then finish.

    Args:
        kills: number of kills.
        starts: for each start, in turns, the number of processes and of data workers.
    """
    chance = random.Random(name)
    for number in range(kills):
        processes, workers = starts[number % len(starts)]
        world = World(tmp, name, processes, f"data.num_workers={workers}", base=streamed(tmp))
        world.until(2 + 2 * number)
        time.sleep(chance.uniform(0, 0.1))
        world.kill()
        assert world.wait() == [-9] * processes, world.output()
    processes, workers = starts[kills % len(starts)]
    return finish(tmp, name, processes, f"data.num_workers={workers}", base=streamed(tmp))


def test_a_killed_run_ends_in_the_bits_of_the_folder(tmp):
    """On one process, on two with data workers, and on one again."""
    world = kill_and_finish(tmp, "killed", 2, [(1, 0), (2, 2)])
    assert "(bitwise" in world.output()
    assert differences(tmp, "folder", "killed") == []


@pytest.mark.slow
def test_control_other_images_in_the_shards_are_other_bits(tmp):
    shutil.copytree(tmp / "shards", tmp / "other")
    (tmp / "other/000000.tar").rename(tmp / "other/last.tar")
    assert main(["index", str(tmp / "other")]) == 0
    base = [*streamed(tmp, "other"), "data.split=count"]
    finish(tmp, "other", 1, "trainer.max_steps=4", base=base)
    base = [*streamed(tmp), "data.split=count"]
    finish(tmp, "same", 1, "trainer.max_steps=4", base=base)
    assert any("denoiser" in line for line in differences(tmp, "same", "other"))


@pytest.mark.slow
def test_a_run_of_the_folder_goes_on_in_shards(tmp):
    folder = ["data=folder", f"data.root={tmp / 'photos'}"]
    finish(tmp, "moved", 1, "trainer.max_steps=10", base=[*TINY, *folder])
    world = World(tmp, "moved", 1, base=streamed(tmp))
    assert world.wait() == [2]  # another source is another run, unless a person says otherwise
    world = finish(tmp, "moved", 1, "ckpt_path=last", base=streamed(tmp))
    assert "a new trajectory begins at this step" in world.output()
    assert differences(tmp, "folder", "moved") == []


def test_changed_shards_are_refused_and_the_images_are_named(tmp):
    shutil.copytree(tmp / "shards", tmp / "changing")
    finish(tmp, "changing", 1, "trainer.max_steps=2", base=streamed(tmp, "changing"))
    (tmp / "changing/000001.tar").unlink()
    world = World(tmp, "changing", 1, base=streamed(tmp, "changing"))
    assert world.wait() == [2]
    assert "the shard 000001.tar is gone" in world.output()
    assert main(["index", str(tmp / "changing")]) == 0
    world = World(tmp, "changing", 1, base=streamed(tmp, "changing"))
    assert world.wait() == [2]
    assert "7 images are gone (a/" in world.output()
    world = finish(tmp, "changing", 1, "ckpt_path=last", base=streamed(tmp, "changing"))
    assert "a new trajectory begins at this step" in world.output()


@pytest.mark.slow
def test_a_report_compares_with_the_images_in_the_shards(tmp):
    """Also where the list of the images is gone from the cache, and the shards were moved."""
    finish(tmp, "report", 1, "trainer.max_steps=2", base=streamed(tmp))
    words = ["run=report", "evaluate.n=16", "evaluate.levels=3", "features.seen=300"]
    run_script(tmp, "evaluate", *words)
    folder = tmp / "runs" / "report" / "evaluation"
    assert "Trained on 52 images" in (folder / "report.md").read_text()
    shutil.rmtree(folder)
    shutil.rmtree(tmp / "cache")
    shutil.copytree(tmp / "shards", tmp / "moved")
    run_script(tmp, "evaluate", *words, f"data_root={tmp / 'moved'}")
    assert "Trained on 52 images" in (folder / "report.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("processes", [1, 2])
def test_five_kills_change_no_bit(tmp, processes, workers):
    name = f"five-{processes}-{workers}"
    kill_and_finish(tmp, name, 5, [(processes, workers)])
    assert differences(tmp, "folder", name) == []
