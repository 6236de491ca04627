"""One training from a folder, a zip, a tar and Hugging Face's files: the same bits, also killed."""

import shutil
import signal
import tarfile
import time
import zipfile

import pytest
from omegaconf import OmegaConf
from test_split import draw

from runs import COMMON, ROOT, differences, kill_at, start, train
from sturdy.evaluation.reference import open_data
from sturdy.sampling.loaded_run import open_run

BASE = [
    *(word for word in COMMON if not word.startswith(("data.source", "data.split", "data.hold"))),
    *("data.holdout=0.3", "backbone=dit", "backbone.width=32", "backbone.depth=1"),
    *("backbone.heads=2", "callbacks.samples.every_n_steps=0"),
]
IMAGES = 60


@pytest.fixture(scope="module")
def tmp(tmp_path_factory):
    """A folder of two classes, its archives and its tables, and a finished run from the folder."""
    tmp = tmp_path_factory.mktemp("sources")
    files = [f"{'cat' if k < 30 else 'dog'}/{k:03d}.png" for k in range(IMAGES)]
    for k, file in enumerate(files):
        draw(tmp / "photos" / file, k)
    with zipfile.ZipFile(tmp / "photos.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in reversed(files):
            archive.write(tmp / "photos" / file, file)
    with tarfile.open(tmp / "photos.tar", "w") as archive:
        archive.add(tmp / "photos", ".")
    train(tmp, "folder", "data=folder", f"data.root={tmp / 'photos'}", base=BASE)
    shutil.rmtree(tmp / "cache")  # every other run decodes for itself
    return tmp


def tables(tmp):
    """Write the images as ``datasets`` does; return the roots."""
    datasets = pytest.importorskip("datasets")
    files = sorted((tmp / "photos").rglob("*.png"))
    rows = {
        "image": [{"bytes": file.read_bytes(), "path": file.name} for file in files],
        "label": [("cat", "dog").index(file.parent.name) for file in files],
    }
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    pets = datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))
    pets.to_parquet(tmp / "pets.parquet", batch_size=7)
    pets.save_to_disk(tmp / "pets", num_shards=2)
    return tmp / "pets.parquet", tmp / "pets"


def kill_while_decoding(tmp, name, *words):
    """Start a run, and SIGKILL it when it has begun to write its cache."""
    process, out, err = start(tmp, name, *words, base=BASE)
    while process.exitcode is None and not list((tmp / "cache").glob("*")):
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, out.read_text() + err.read_text()


def test_from_a_zip_killed_while_decoding_and_while_training(tmp):
    words = ("data=folder", f"data.root={tmp / 'photos.zip'}")
    kill_while_decoding(tmp, "zip", *words)
    kill_at(tmp, "zip", 6, *words, base=BASE, saved=True)
    said = train(tmp, "zip", *words, base=BASE)
    assert "(bitwise" in said.stdout + said.stderr
    assert differences(tmp, "folder", "zip") == []


def test_from_a_tar(tmp):
    train(tmp, "tar", "data=folder", f"data.root={tmp / 'photos.tar'}", base=BASE)
    assert differences(tmp, "folder", "tar") == []


@pytest.mark.slow
def test_from_tables(tmp):
    parquet, arrow = tables(tmp)
    said = train(tmp, "parquet", "data=huggingface", f"data.root={parquet}", base=BASE)
    assert f"{IMAGES} images, classes: cat 30, dog 30" in said.stdout + said.stderr
    assert differences(tmp, "folder", "parquet") == []
    shutil.rmtree(tmp / "cache")
    words = ("data=huggingface", f"data.root={arrow}")
    kill_at(tmp, "arrow", 6, *words, base=BASE, saved=True)
    said = train(tmp, "arrow", *words, base=BASE)
    assert "(bitwise" in said.stdout + said.stderr
    assert differences(tmp, "folder", "arrow") == []


@pytest.mark.slow
def test_control_other_images_give_other_bits(tmp):
    with zipfile.ZipFile(tmp / "photos.zip") as archive:
        archive.extractall(tmp / "other")
    draw(tmp / "other/cat/000.png", 999)
    with zipfile.ZipFile(tmp / "other.zip", "w") as archive:
        for file in sorted((tmp / "other").rglob("*.png")):
            archive.write(file, file.relative_to(tmp / "other"))
    train(tmp, "other", "data=folder", f"data.root={tmp / 'other.zip'}", base=BASE)
    assert differences(tmp, "folder", "other") != []


@pytest.mark.slow
def test_a_run_goes_on_from_the_archive_of_its_folder(tmp):
    shutil.copytree(tmp / "runs/folder", tmp / "runs/moved")
    words = ("data=folder", f"data.root={tmp / 'photos.zip'}", "trainer.max_steps=15")
    said = train(tmp, "moved", *words, base=BASE)
    assert "(bitwise" in said.stdout + said.stderr
    train(tmp, "whole", "data=folder", f"data.root={tmp / 'photos'}", words[2], base=BASE)
    assert differences(tmp, "whole", "moved") == []


def evaluated(tmp, name, data_root):
    """Open the images of a run as ``evaluate.py`` does."""
    paths = {"runs": str(tmp / "runs"), "cache": str(tmp / "cache")}
    words = {"run": name, "ckpt_path": "last", "device": "cpu", "threads": 1, "trust": []}
    cfg = OmegaConf.load(ROOT / "conf" / "evaluate.yaml")
    cfg = OmegaConf.merge(cfg, words, {"paths": paths, "data_root": data_root})
    return open_data(cfg, open_run(cfg))


@pytest.mark.slow
def test_a_report_reads_them_where_they_were_moved(tmp):
    parquet, _ = tables(tmp)
    for name, words, root in (
        ("judged-zip", "data=folder", tmp / "photos.zip"),
        ("judged-table", "data=huggingface", parquet),
    ):
        train(tmp, name, words, f"data.root={root}", base=BASE)
        moved = root.rename(tmp / f"moved{root.suffix}")
        shutil.rmtree(tmp / "cache")
        with pytest.raises(ValueError, match=r"does not exist.*moved: data_root=FOLDER"):
            evaluated(tmp, name, None)
        data = evaluated(tmp, name, str(moved))
        assert (len(data.cache), tuple(data.classes)) == (IMAGES, ("cat", "dog"))
        moved.rename(root)
