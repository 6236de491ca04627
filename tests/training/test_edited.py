"""Somebody edits the checkout, the configuration and the images of a run while nobody looks after
it.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runs import COMMON, ROOT, differences, fork

TINY = [
    *(word for word in COMMON if not word.startswith(("data.source", "backbone"))),
    *("data=folder", "backbone=dit", "backbone.width=32", "backbone.depth=1", "backbone.heads=2"),
]


class Checkout:
    """A copy of the project under ``tmp``, and a folder of images, both to be edited."""

    def __init__(self, tmp: Path) -> None:
        self.tmp, self.images = tmp, tmp / "images"
        for part in ("src", "conf"):
            shutil.copytree(
                ROOT / part, tmp / part, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
            )
        shutil.copy(ROOT / "train.py", tmp)
        self.images.mkdir()
        for number in range(24):
            self.draw(f"{number:02}.png", number)

    def draw(self, name: str, seed: int) -> None:
        pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(self.images / name)

    def edit(self, file: str, old: str, new: str) -> None:
        path = self.tmp / file
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    def words(self, name: str, *more: str) -> list[str]:
        paths = [
            f"paths.runs={self.tmp / 'runs'}",
            f"paths.cache={self.tmp / 'cache'}",
            f"data.root={self.images}",
        ]
        return [str(self.tmp / "train.py"), *TINY, *paths, f"name={name}", *more]

    def start(self, name: str, *more: str, **environment: str) -> "subprocess.Popen[str]":
        """Start the command with the source of this checkout."""
        return subprocess.Popen(
            [sys.executable, *self.words(name, *more)],
            env=os.environ | {"PYTHONPATH": str(self.tmp / "src")} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def train(self, name: str, *more: str, code: int = 0, **environment: str) -> str:
        """Run to the end with the source that is imported already; the configuration is that of
        this checkout.
        """
        before = dict(os.environ)
        os.environ.update(environment)
        try:
            process, out, err = fork(self.tmp, name, self.words(name, *more))
        finally:
            os.environ.clear()
            os.environ.update(before)
        process.join(300)
        output = out.read_text() + err.read_text()
        assert process.exitcode == code, output
        return output


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A checkout with the undisturbed run ``whole``, and with ``half`` of it done in other
    copies.
    """
    checkout = Checkout(tmp_path_factory.mktemp("edited"))
    checkout.train("whole")
    for name in ("queue", "person", "asked"):
        checkout.train(name, "trainer.max_steps=6")
    checkout.edit("conf/optimizer/adamw.yaml", "lr: ", "lr: 1")
    for number in range(30, 43):
        checkout.draw(f"{number}.png", number)
    (checkout.images / "03.png").unlink()
    checkout.draw("04.png", 99)
    return checkout


def test_a_restart_by_a_queue_goes_on_with_what_the_run_began_with(checkout):
    said = checkout.train("queue", SLURM_RESTART_COUNT="1")
    assert "resumed from step 6" in said
    assert "bitwise" in said
    assert "the configuration was edited: optimizer.lr is" in said
    assert "13 images are new, and not used" in said
    assert differences(checkout.tmp, "whole", "queue") == []


def test_a_person_may_say_that_it_goes_on_so(checkout):
    checkout.train("person", "as_begun=true")
    assert differences(checkout.tmp, "whole", "person") == []


def test_control_a_person_is_asked(checkout):
    said = checkout.train("asked", code=2)
    assert "optimizer.lr: " in said
    assert "13 images are new (30.png, 31.png" in said
    assert said.index("optimizer.lr: ") < said.index("13 images are new")
    assert "as_begun=true" in said
    assert "prior" not in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_supervised_run_of_thirty_restarts_while_somebody_edits(tmp_path):
    """Comments and unrelated modules of ``src``, images that come and go, the configuration; killed
    thirty times.
    """
    checkout = Checkout(tmp_path)
    long = (
        "trainer.max_steps=1500",
        "trainer.val_check_interval=100",
        "callbacks.checkpoint.every_n_train_steps=25",
    )
    calm = (
        "callbacks.samples.every_n_steps=700",
        "restarts=1000",
        "callbacks.checkpoint.keep_last=2",
    )
    whole = checkout.start("whole", *long, *calm)
    output, _ = whole.communicate(timeout=600)
    assert whole.returncode == 0, output

    rng, process = (
        random.Random(int(os.environ.get("STURDY_SEED", "0"))),
        checkout.start("edited", *long, *calm),
    )
    metrics, kills = tmp_path / "runs" / "edited" / "metrics.csv", 0
    while kills < 30 and process.poll() is None:
        size = metrics.stat().st_size if metrics.exists() else 0
        end = time.monotonic() + 120
        while process.poll() is None and (not metrics.exists() or metrics.stat().st_size <= size):
            assert time.monotonic() < end
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 1))
        edit(checkout, kills, rng)
        if worker := child(process.pid):
            os.kill(worker, signal.SIGKILL)
            kills += 1
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    print(kills, "kills")
    assert kills == 30
    assert differences(tmp_path, "whole", "edited") == []

    checkout.edit("src/sturdy/backbone/dit.py", "* (1 + scale)", "* (2 + scale)")
    control = checkout.start(
        "edited", *long, *calm, "trainer.max_steps=1600", SLURM_RESTART_COUNT="1"
    )
    output, _ = control.communicate(timeout=600)
    assert control.returncode == 2, output
    assert "the code changed, 1 of" in output
    assert "sturdy.backbone.dit" in output


def edit(checkout: Checkout, number: int, rng: random.Random) -> None:
    """Do one of the things that people do to a checkout beside a run."""
    package = checkout.tmp / "src" / "sturdy"
    match number % 5:
        case 0:
            trained = ("training/module.py", "backbone/dit.py", "diffusion/objective.py")
            path = package / rng.choice([*trained, "../exact_resume/permutation.py"])
            path.write_text(path.read_text() + f"\n# comment {number}\n")
        case 1:
            path = package / rng.choice(["evaluation/figures.py", "cli/sweep.py", "prove.py"])
            path.write_text(path.read_text() + f"\n\nX{number} = {number}\n")
            (package / "backbone" / f"mine{number}.py").write_text("raise SystemExit\n")
        case 2:
            checkout.draw(f"new{number}.png", 1000 + number)
        case 3:
            min(checkout.images.glob("*.png")).unlink()
        case 4:
            path = checkout.tmp / "conf" / "optimizer" / "adamw.yaml"
            path.write_text(path.read_text().replace("weight_decay: ", "weight_decay: 1"))


def child(pid: int) -> int | None:
    """The process id of the one that a supervisor has started, if it lives now."""
    children = " ".join(c.read_text() for c in Path(f"/proc/{pid}/task").glob("*/children")).split()
    workers = [int(c) for c in children if b"RANK=" in _environment(int(c))]
    return workers[0] if workers else None


def _environment(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""
