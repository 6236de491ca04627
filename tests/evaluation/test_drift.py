"""New images against the old: by the door, with a wrong folder among them, and what is known."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from examples.cars.source import Cars
from runs import SMALL_UNET, run_script, train
from sturdy.evaluation.distances import count_as_extreme, own_neighbours
from sturdy.evaluation.drift import Drift, measure

WORDS = [word for word in SMALL_UNET if word not in ("data.source.n=60", "data.split=count")]
WORDS += ["data=folder", "data.holdout=0.3", "callbacks.samples=null", "trainer.max_steps=3"]
DRIFT = ["run=run", "drift=true", "features.seen=600"]


def save(pixels, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def cars(folder, numbers):
    source = Cars(n=1000, size=16)
    for k in numbers:
        save(source.decode(k).transpose(1, 2, 0), folder / f"car{k:03d}.png")


def stripes(folder, n):
    """What nobody would call cars."""
    for k in range(n):
        x = np.full((16, 16, 3), 20, np.uint8)
        x[:: k % 3 + 2] = (250, 10 * k, 240)
        save(x, folder / f"stripes{k:02d}.png")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("drift")
    cars(tmp / "photos" / "a", range(60))
    cars(tmp / "photos" / "b", range(60, 120))
    train(tmp, "run", *WORDS[:-1], f"data.root={tmp / 'photos'}", "trainer.max_steps=3", base=[])
    return tmp


def test_a_wrong_folder_is_named_before_and_after_it_was_trained_on(run):
    assert "no image of run is new" in run_script(run, "evaluate", *DRIFT)

    cars(run / "photos" / "b", range(200, 220))
    stripes(run / "photos" / "wrong", 12)
    shutil.copy(run / "photos/a/car000.png", run / "photos/a/copy.png")
    said = run_script(run, "evaluate", *DRIFT)
    assert "32 new images, not trained on yet, against" in said
    assert "the new images differ from the old: of 1,000 random divisions" in said
    assert "strange by folder: wrong " in said
    out = run / "runs" / "run" / "drift"
    with Image.open(out / "strangest.png") as sheet:
        assert min(sheet.size) > 300
    numbers = json.loads((out / "report.json").read_text())
    farthest = sorted(numbers["distances"], key=numbers["distances"].get)[-12:]
    assert {name.split("/")[0] for name in farthest} == {"wrong"}
    assert numbers["kid"][0] > numbers["floor"][0]
    assert min(numbers["divisions"]) < 5

    words = [*WORDS[:-1], f"data.root={run / 'photos'}", "trainer.max_steps=5", "ckpt_path=last"]
    assert "drift=true" in train(run, "run", *words, base=[]).stdout
    again = run_script(run, "evaluate", *DRIFT)
    assert "32 new images, trained on since step 3, against" in again
    assert said.splitlines()[-5:-1] == again.splitlines()[-5:-1]  # the same figures

    kept = run / "cache-of-today"
    (run / "cache").rename(kept)
    assert "does not have the images before step 3 any more" in run_script(
        run, "evaluate", *DRIFT, code=2
    )
    shutil.rmtree(run / "cache")
    kept.rename(run / "cache")
    shutil.move(run / "photos", run / "away")  # the images are in the cache
    assert "32 new images, trained on since step 3" in run_script(run, "evaluate", *DRIFT)
    shutil.move(run / "away", run / "photos")


def normal(n, *, mean=0.0, seed=0):
    return mean + torch.randn(n, 16, generator=torch.Generator().manual_seed(seed))


def count_divisions(a, b):
    points = torch.cat([a, b])
    return count_as_extreme(len(a), len(b), own_neighbours(points), divisions=100)


def test_any_number_of_divisions_is_equally_probable_for_images_of_one_kind():
    counts = []
    for seed in range(40):
        counts.append(count_divisions(normal(20, seed=2 * seed), normal(30, seed=2 * seed + 1)))
    assert 30 < sum(counts) / 40 < 75
    assert sum(count < 10 for count in counts) < 12
    assert count_divisions(normal(20), normal(30, mean=2.0, seed=1)) == 0


def test_what_is_near_is_not_strange_and_what_is_far_is():
    train_features, held_out = normal(200, seed=1), normal(50, seed=2)
    new = torch.cat([normal(30, seed=3), normal(12, mean=9.0, seed=4)])
    drift = measure(train_features, held_out, new)
    assert drift.strange[30:].all()
    assert drift.strange[:30].sum() <= 3
    assert drift.distances[:30].median() == pytest.approx(1, abs=0.2)
    assert min(drift.divisions) < 5
    assert "the new images differ from the old:" in drift.describe()[2]
    alike = measure(train_features, held_out, new[:30])
    assert min(alike.divisions) >= 5
    assert "no difference is seen:" in alike.describe()[2]


def test_few_images_get_no_kid_and_are_still_measured():
    drift = measure(normal(20, seed=1), normal(9, seed=2), normal(3, mean=9.0, seed=3))
    assert isinstance(drift, Drift)
    assert (drift.kid, drift.divisions) == (None, None)
    assert "too few images" in drift.describe()[0]
    assert drift.strange.all()
