"""Images come and go while a run trains: three growths with kills between them end in the bits of
the same growths without, and no image is ever on both sides.
"""

import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from exact_resume.__main__ import main
from exact_resume.checkpoint.store import Store
from exact_resume.files import atomic_write
from runs import SMALL_UNET, differences, train
from worlds import World

STAGE = 9  # steps from one growth to the next
BASE = [word for word in SMALL_UNET if word not in ("data.source.n=60", "data.split=count")]
BASE += ["data=folder", "trainer.log_every_n_steps=1", "callbacks.samples.every_n_steps=null"]
BASE += ["data.shards=4", "reduction=tree", "data.holdout=0.3"]


def draw(path: Path, k: int) -> None:
    """Write image ``k``, a few shades of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    x = np.random.default_rng(k).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    with atomic_write(path, durable=False) as file:
        Image.fromarray(x).resize((16, 16)).save(file, "PNG")


def begin(root: Path) -> None:
    for k in range(40):
        draw(root / "ab"[k % 2] / f"{k:02d}.png", k)


def add_remove_change_rename(root: Path) -> None:
    for k in range(40, 60):
        draw(root / "ab"[k % 2] / f"{k}.png", k)
    for k in (0, 1, 2, 3):
        (root / "ab"[k % 2] / f"{k:02d}.png").unlink()
    draw(root / "a/04.png", 104)
    (root / "b/05.png").rename(root / "b/renamed.png")


def copy_and_move(root: Path) -> None:
    """The same content under two names, and in another class."""
    shutil.copy(root / "a/06.png", root / "a/copy.png")
    for k in (7, 9, 11):
        (root / f"b/{k:02d}.png").rename(root / f"a/{k:02d}.png")


def bring_back_and_add_a_class(root: Path) -> None:
    for k in (0, 1, 2, 3):
        draw(root / "ab"[k % 2] / f"again{k}.png", k)
    for k in range(60, 70):
        draw(root / "c" / f"{k}.png", k)


GROWTHS = (begin, add_remove_change_rename, copy_and_move, bring_back_and_add_a_class)


def sides_of(path: Path) -> Callable[[int], None]:
    """Return a ``first`` of ``World`` that notes the content of each image, and its side."""

    def install(rank: int) -> None:
        from sturdy.data.images import ImageDataset

        getitem = ImageDataset.__getitem__

        def noting(self, positions):
            side = "held-out" if self.seed is None else "trained-on"
            contents = self.cache.contents[self._indices(positions)]
            with path.open("a") as file:
                file.writelines(f"{side} {content}\n" for content in contents)
            return getitem(self, positions)

        ImageDataset.__getitem__ = noting

    return install


def grow_and_train(tmp: Path, name: str, killed: bool, growths: int = 4) -> Path:
    """Train through the first growths; return the file that notes the sides of images.

    With ``killed``, each stage is killed at some step after its first checkpoint, and continued by
    the plain command; one stage has two processes.
    """
    root, sides = tmp / name / "photos", tmp / name / "sides"
    root.mkdir(parents=True)
    dice = random.Random(7)
    for k, grow in enumerate(GROWTHS[:growths]):
        grow(root)
        words = [f"data.root={root}", f"trainer.max_steps={STAGE * (k + 1)}"]
        asked = ["ckpt_path=last"] if k else []
        processes = 2 if killed and k == 2 else 1
        how = {"base": BASE, "first": sides_of(sides)}
        world = World(tmp, name, processes, *words, *asked, **how)
        if killed:
            step = STAGE * k + dice.randrange(4, STAGE - 1)
            assert world.until(step).kill().wait() == [-signal.SIGKILL] * processes
            world = World(tmp, name, processes, *words, **how)
        assert world.wait() == [0] * processes, world.output()
        if killed:
            assert "(bitwise" in world.output(0)
        elif k:
            assert "the next resume of it is bitwise again" in world.output(0)
    return sides


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of both runs, and for each the contents that were ever on either side."""
    tmp = tmp_path_factory.mktemp("growths")
    sides = {}
    for name in ("whole", "killed"):
        lines = grow_and_train(tmp, name, killed=name == "killed").read_text().splitlines()
        pairs = {tuple(line.split()) for line in lines}
        sides[name] = [
            {content for side, content in pairs if side == which}
            for which in ("held-out", "trained-on")
        ]
    return tmp, sides


@pytest.mark.slow
def test_three_growths_with_kills_between_end_in_the_same_bits(runs):
    tmp, _ = runs
    assert differences(tmp, "whole", "killed") == []


@pytest.mark.slow
def test_control_one_image_more_gives_other_bits(runs):
    tmp, _ = runs
    for name in ("same", "other"):
        root = tmp / name / "photos"
        shutil.copytree(tmp / "whole" / "photos", root)
        shutil.copytree(tmp / "runs" / "whole", tmp / "runs" / name)
        if name == "other":
            draw(root / "a/one-more.png", 999)
        words = [f"data.root={root}", f"trainer.max_steps={STAGE * 4 + 1}", "ckpt_path=last"]
        train(tmp, name, *words, base=BASE)
    assert differences(tmp, "same", "other") != []


@pytest.mark.slow
def test_no_image_is_ever_on_both_sides(runs):
    _, sides = runs
    for held_out, trained_on in sides.values():
        assert len(held_out) > 10
        assert len(trained_on) > 30
        assert held_out & trained_on == set()
    assert sides["whole"] == sides["killed"]


@pytest.mark.slow
def test_the_record_says_where_a_trajectory_began(runs, capsys):
    tmp, _ = runs
    home = tmp / "runs" / "killed"
    manifest = Store(home / "checkpoints").last()
    entries = manifest["trajectories"]
    assert [entry["step"] for entry in entries] == [STAGE, 2 * STAGE, 3 * STAGE]
    assert "20 images are new (a/40.png" in entries[0]["reasons"][-1]
    listed = (home / "attempts" / "003" / "changes.txt").read_text()
    assert "20 images are new\n    a/40.png\n" in listed
    assert not (home / "attempts" / "004" / "changes.txt").exists()  # a bitwise resume
    main(["status", str(home)])
    said = " ".join(capsys.readouterr().out.split())
    assert f"at step {STAGE} a new trajectory began: the data changed: 20 images are new" in said
    assert "finished at step 36" in said


def test_a_growth_with_a_kill_ends_in_the_same_bits_and_no_image_changes_sides(tmp_path):
    for name in ("whole", "killed"):
        lines = grow_and_train(tmp_path, name, name == "killed", growths=2).read_text().splitlines()
        held_out = {line.split()[1] for line in lines if line.startswith("held-out")}
        trained_on = {line.split()[1] for line in lines if line.startswith("trained-on")}
        assert len(held_out) > 10
        assert len(trained_on) > 20
        assert held_out & trained_on == set()
    assert differences(tmp_path, "whole", "killed") == []


@pytest.mark.slow
def test_by_count_it_is_said_who_changed_sides_and_without_the_cache_why_nothing_is(tmp_path):
    root = tmp_path / "photos"
    begin(root)
    words = [f"data.root={root}", "data.split=count", "trainer.max_steps=3"]
    train(tmp_path, "run", *words, base=BASE)
    add_remove_change_rename(root)
    refused = train(tmp_path, "run", *words[:2], base=BASE, code=2).stderr
    assert "that were trained on before" not in refused
    assert "are held out now, but trained on before" in refused
    assert "evaluate.py run=run drift=true" in refused
    shutil.rmtree(tmp_path / "cache")
    refused = train(tmp_path, "run", *words[:2], base=BASE, code=2).stderr
    assert "so the changes cannot be named" in refused


@pytest.mark.slow
def test_a_restart_by_the_supervisor_goes_on_with_the_images_of_the_growth(tmp_path):
    """The folder grows once more while the run trains: the restarted processes do not see it."""
    from runs import command

    for name in ("whole", "killed"):
        root = tmp_path / name / "photos"
        begin(root)
        words = [f"data.root={root}", "trainer.max_steps=6"]
        train(tmp_path, name, *words, base=BASE)
        add_remove_change_rename(root)
        words = [f"data.root={root}", "trainer.max_steps=24", "ckpt_path=last"]
        if name == "whole":
            train(tmp_path, name, *words, base=BASE)
            continue
        supervised = command(tmp_path, name, *words, "restarts=3", base=BASE)
        log = tmp_path / "supervised.out"
        with log.open("w") as output:
            process = subprocess.Popen(supervised, stdout=output, stderr=output)
        store = Store(tmp_path / "runs" / name / "checkpoints")
        while max(store.steps(), default=0) < 9 and process.poll() is None:
            pass
        bring_back_and_add_a_class(root)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGKILL)
        assert process.wait(300) == 0, log.read_text()
        said = log.read_text()
        assert "14 images are new, and not used" in said
        assert "(bitwise" in said
    assert differences(tmp_path, "whole", "killed") == []
