"""Parquet files and folders of Hugging Face's datasets, written by the real libraries."""

import io
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from image_files import content
from PIL import Image

from sturdy.data.cache import open_cache
from sturdy.data.folder import Folder
from sturdy.data.huggingface import HuggingFace
from sturdy.data.source import BadImageError
from sturdy.data.table_rows import TableRows

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402

LIMIT = 10**6


@pytest.fixture(autouse=True)
def quiet(tmp_path, monkeypatch):
    """No progress bars, and nothing in the home of the user."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf-home"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-home")
    datasets.disable_progress_bars()


def image(k):
    """The bytes of a small picture."""
    file = io.BytesIO()
    x = np.random.default_rng(k).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    Image.fromarray(x).save(file, "PNG")
    return file.getvalue()


def pets(n=12, start=0, **columns):
    """A data set of two named classes with texts."""
    numbers = range(start, start + n)
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    kinds |= {"text": datasets.Value("string")} | {
        name: datasets.Value("int64" if isinstance(values[0], int) else "string")
        for name, values in columns.items()
    }
    rows = {
        "image": [{"bytes": image(k), "path": f"{k:02d}.png"} for k in numbers],
        "label": [k % 2 for k in numbers],
        "text": [f"a pet {k % 5}" for k in numbers],
        **columns,
    }
    return datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))


def saved(path, n=12):
    pets(n).save_to_disk(path, num_shards=3)
    return path


def parquet(path, n=12):
    """As the hub has them: several files, several groups of rows each."""
    (path / "data").mkdir(parents=True)
    whole = pets(n)
    for k in range(2):
        part = whole.shard(2, k, contiguous=True)
        part.to_parquet(path / "data" / f"train-{k:05d}-of-00002.parquet", batch_size=2)
    pets(3, 50).to_parquet(path / "data" / "test-00000-of-00001.parquet")
    (path / "README.md").write_text("---\ndataset_info: {}\n---\n")
    (path / "pets.py").write_text("raise SystemExit('a script was executed')")
    return path


def one_file(path, n=12):
    pets(n).to_parquet(f"{path}.parquet", batch_size=5)
    return path.parent / f"{path.name}.parquet"


WRITE = [saved, parquet, one_file]


def refusal(**options):
    with pytest.raises(ValueError, match=r"\w+=") as error:
        HuggingFace(**options)
    return str(error.value)


@pytest.mark.parametrize("write", WRITE)
def test_it_is_the_folder_of_its_images(tmp_path, write):
    for k in range(12):
        path = tmp_path / "photos" / ("cat", "dog")[k % 2] / f"{k:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image(k))
        path.with_suffix(".txt").write_text(f"a pet {k % 5}")
    folder = Folder(root=tmp_path / "photos", image_size=8, captions=True)
    order = sorted(range(12), key=lambda k: (k % 2, k))
    source = HuggingFace(root=write(tmp_path / "set"), image_size=8, captions=True)
    assert source.classes == folder.classes == ("cat", "dog")
    assert source.captions == folder.captions
    names = [source.name(k) for k in range(12)]
    assert names == [f"{k:02d}.png" for k in range(12)]
    for row, k in enumerate(order):
        assert source.label(k) == folder.label(row)
        assert source.caption(k) == folder.caption(row)
        assert source.content(k) == folder.content(row)
        assert np.array_equal(source.decode(k), folder.decode(row))


def test_in_the_same_order_the_cache_is_the_same(tmp_path):
    numbers = [*range(0, 12, 2), *range(1, 12, 2)]  # as the folder sorts them
    pets().select(numbers).save_to_disk(tmp_path / "set")
    for k in range(12):
        path = tmp_path / "photos" / ("cat", "dog")[k % 2] / f"{k:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image(k))
    source = HuggingFace(root=tmp_path / "set", image_size=8)
    ours = open_cache(source, root=tmp_path / "cache")
    folder = open_cache(Folder(root=tmp_path / "photos", image_size=8), root=tmp_path / "cache")
    assert ours.path != folder.path
    assert content(ours) == content(folder)
    assert ours.digest_with_contents == folder.digest_with_contents


def test_a_start_says_what_was_understood(tmp_path):
    root = parquet(tmp_path / "set")
    lines = HuggingFace(root=root).summary_lines()
    assert lines == [
        f"{root} (2 files, train): 12 images, classes: cat 6, dog 6",
        "columns: image (images), label (classes); not used: text",
        "left out: the subset test",
    ]
    lines = HuggingFace(root=root, subset="test", labels=False, captions=True).summary_lines()
    assert lines == [
        f"{root} (1 file, test): 3 images, no classes",
        "columns: image (images), text (captions); not used: label",
        'captions: 3 of 3 images (text 3), 3 different; e.g. "a pet 0"',
        "left out: the subset train",
    ]


def test_subsets(tmp_path):
    both = datasets.DatasetDict(train=pets(6), validation=pets(4, 20))
    both.save_to_disk(tmp_path / "dict")
    assert len(HuggingFace(root=tmp_path / "dict")) == 6
    assert len(HuggingFace(root=tmp_path / "dict", subset="validation")) == 4
    assert len(HuggingFace(root=tmp_path / "dict/validation")) == 4
    said = refusal(root=tmp_path / "dict", subset="test")
    assert said.endswith("dict: subset=train, subset=validation")
    (tmp_path / "configs/a/train").mkdir(parents=True)
    (tmp_path / "configs/b").mkdir(parents=True)
    pets(2).to_parquet(tmp_path / "configs/a/train/0000.parquet")
    pets(3).to_parquet(tmp_path / "configs/b/train-00000-of-00001-abcdef.parquet")
    said = refusal(root=tmp_path / "configs")
    assert "give one of subset=a/train, subset=b/train" in said
    assert len(HuggingFace(root=tmp_path / "configs", subset="b/train")) == 3
    assert len(HuggingFace(root=tmp_path / "configs/a")) == 2


def test_what_lies_in_the_folder_of_an_earlier_save_is_not_read(tmp_path):
    pets(12).save_to_disk(tmp_path / "set", num_shards=2)
    pets(7).save_to_disk(tmp_path / "set", num_shards=3)
    (tmp_path / "set/cache-0123.arrow").write_bytes(b"of a map")
    assert len(list((tmp_path / "set").glob("data-*.arrow"))) == 5
    assert len(HuggingFace(root=tmp_path / "set")) == 7


# --- columns


def test_names_of_rows_without_file_names(tmp_path):
    rows = {"picture": [image(k) for k in range(4)], "kind": ["b", "a", "b", None]}
    pq.write_table(pa.table(rows), tmp_path / "plain.parquet", row_group_size=3)
    source = HuggingFace(root=tmp_path / "plain.parquet", label_column="kind", image_size=8)
    assert [source.name(k) for k in range(3)] == ["row/00000000", "row/00000001", "row/00000002"]
    assert (source.classes, [source.label(k) for k in range(3)]) == (("a", "b"), [1, 0, 1])
    assert source.content(2) == image(2)
    assert source.summary_lines()[1:] == [
        "columns: picture (images), kind (classes)",
        "left out: 1 rows without a class in kind",
    ]
    free = HuggingFace(root=tmp_path / "plain.parquet")
    assert (len(free), free.classes) == (4, ())
    assert free.summary_lines()[1].endswith("; label_column=NAME reads classes from kind")
    with pytest.raises(IndexError):
        free.name(4)


def test_paths_are_names_and_never_followed(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(image(0))
    for path in ("../../etc/passwd", str(secret), "https://example.com/2.png"):
        rows = [{"bytes": None, "path": path}, {"bytes": image(1), "path": "/a\\b/1.png"}, None]
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        pq.write_table(pa.table({"image": pa.array(rows, kind)}), tmp_path / "a.parquet")
        source = HuggingFace(root=tmp_path / "a.parquet", image_size=8)
        for k in (0, 2):
            with pytest.raises(BadImageError, match="no bytes in this row"):
                source.decode(k)
        assert source.content(1) == image(1)
    only = pa.array(rows[:2], kind)
    pq.write_table(pa.table({"image": only}), tmp_path / "a.parquet")
    assert HuggingFace(root=tmp_path / "a.parquet").name(1) == "1.png"


def test_numbers_without_names_are_sorted_as_numbers(tmp_path):
    rows = {"image": [image(k) for k in range(4)], "label": [10, 9, 10, 100]}
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    source = HuggingFace(root=tmp_path / "a.parquet")
    assert source.classes == ("9", "10", "100")
    assert [source.label(k) for k in range(4)] == [1, 0, 1, 2]
    assert HuggingFace(root=tmp_path / "a.parquet", labels=False).classes == ()


def test_a_class_without_images_is_none(tmp_path):
    rows = pets(6).filter(lambda row: row["label"] == 1)
    rows.save_to_disk(tmp_path / "set")
    source = HuggingFace(root=tmp_path / "set")
    assert (source.classes, source.label(0)) == (("dog",), 0)
    assert source.summary_lines()[-1] == "left out: 1 classes without images"
    hidden = {"image": [image(k) for k in range(2)], "label": [-1, -1]}
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    table = datasets.Dataset.from_dict(hidden, features=datasets.Features(kinds))
    table.to_parquet(tmp_path / "test.parquet")
    said = refusal(root=tmp_path / "test.parquet")
    assert "has no rows with images; 2 rows without a class in label" in said
    assert len(HuggingFace(root=tmp_path / "test.parquet", labels=False)) == 2


def test_where_columns_are_not_clear_they_are_named(tmp_path):
    def table(**columns):
        pq.write_table(pa.table(columns), tmp_path / "a.parquet")
        return {"root": tmp_path / "a.parquet"}

    images, texts = [image(0), image(1)], ["one", "two"]
    said = refusal(**table(a=images, b=images))
    assert "give one of image_column=a, image_column=b" in said
    assert HuggingFace(**table(a=images, b=images), image_column="b").content(0) == image(0)
    assert "the columns are a (string)" in refusal(**table(a=texts))
    assert "image_column=a is none" in refusal(**table(a=texts), image_column="a")
    assert "image_column=c is no column" in refusal(**table(a=images), image_column="c")
    two = table(a=images, b=texts, c=texts)
    assert "caption_column=b, caption_column=c" in refusal(**two, captions=True)
    assert HuggingFace(**two, captions=True, caption_column="c").captions == ("one", "two")
    assert "has no column of texts" in refusal(**table(a=images), captions=True)
    assert "caption_column=a is no column of texts" in refusal(
        **table(a=images, text=texts), captions=True, caption_column="a"
    )
    assert "labels=true, and" in refusal(**table(a=images), labels=True)
    assert "label_column=a must have whole numbers" in refusal(**table(a=images), label_column="a")
    missing = table(a=images, text=["one", None])
    assert "1 of 2 images have no caption in text" in refusal(**missing, captions=True)
    filled = HuggingFace(**missing, captions=True, caption="a photo")
    assert filled.captions == ("a photo", "one")
    kinds = {name: datasets.ClassLabel(names=["x", "y"]) for name in ("fine", "coarse")}
    kinds["image"] = datasets.Image()
    rows = {"image": [{"bytes": b, "path": None} for b in images], "fine": [0, 1], "coarse": [1, 0]}
    both = datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))
    both.to_parquet(tmp_path / "a.parquet")
    said = refusal(root=tmp_path / "a.parquet")
    assert "give one of label_column=" in said
    assert said.endswith("labels=false")
    assert HuggingFace(root=tmp_path / "a.parquet", label_column="coarse").label(0) == 1


# --- files that are not what they should be


def test_files_that_are_missing_cut_short_or_something_else(tmp_path):
    root = parquet(tmp_path / "set")
    first, second = sorted((root / "data").glob("train-*"))
    data = second.read_bytes()
    second.write_bytes(data[: len(data) // 2])
    assert "is no whole .parquet file" in refusal(root=root)
    second.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "a Git LFS pointer, not the file: git lfs pull fetches it" in refusal(root=root)
    pq.write_table(pa.table({"image": [image(0)]}), second)
    assert "has other columns than train-00000-of-00002.parquet" in refusal(root=root)
    second.unlink()
    assert "has 1 files of train, such as train-00000-of-00002.parquet" in refusal(root=root)
    first.unlink()
    assert len(HuggingFace(root=root)) == 3  # the test subset is the only one
    arrow = saved(tmp_path / "disk")
    last = sorted(arrow.glob("*.arrow"))[-1]
    data = last.read_bytes()
    for end in (0, len(data) // 2, len(data) - 8):
        last.write_bytes(data[:end])
        assert "is no whole .arrow file" in refusal(root=arrow)
    for name in ("1.jpg", "dataset.py"):
        (tmp_path / "other" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "other" / name).touch()
    said = refusal(root=tmp_path / "other")
    assert "found 1 .jpg, 1 .py; a loading script is code, and is not run" in said
    with pytest.raises(NotADirectoryError, match="is a file, not a folder"):
        HuggingFace(root=tmp_path / "other/1.jpg")
    assert "give the folder of the data set" in refusal(root=None)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        HuggingFace(root=tmp_path / "nowhere")
    with pytest.raises(NotADirectoryError, match="data=huggingface reads it"):
        Folder(root=one_file(tmp_path / "one"))
    with pytest.raises(ValueError, match=r"1 \.parquet \(data=huggingface reads them\)"):
        Folder(root=root)


def test_damaged_rows_are_broken_images(tmp_path):
    path = one_file(tmp_path / "one", 60)
    data = bytearray(path.read_bytes())
    at = data.index(image(25))  # begins a group of rows
    data[at - 30 : at + 10] = bytes(40)
    path.write_bytes(data)
    source = HuggingFace(root=path, image_size=8)
    broken = 0
    for k in range(60):
        try:
            intact = source.content(k) == image(k)
            source.decode(k)
        except BadImageError:
            intact = False
        broken += not intact
    assert broken == 5  # other groups of rows are whole


def test_threads_read_at_once_and_few_groups_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("sturdy.data.table_rows.available_cpus", lambda: 1)
    groups = TableRows([one_file(tmp_path / "one", 300)])
    mapped = TableRows(sorted(saved(tmp_path / "set", 300).glob("*.arrow")))
    order = np.random.default_rng(0).permutation(300).tolist()
    for rows, parts in ((groups, 60), (mapped, 3)):
        with ThreadPoolExecutor(8) as pool:
            read = list(pool.map(lambda k, r=rows: r.read(k, "image", "bytes", LIMIT), order))
        assert read == [image(k) for k in order]
        assert len(rows.parts) == parts
        assert len(rows._groups) <= 8
    with pytest.raises(BadImageError, match="over the limit"):
        rows.read(0, "image", "bytes", 10)


def test_the_key_changes_with_the_files_and_the_options(tmp_path):
    root = parquet(tmp_path / "set")
    options = [
        {},
        {"subset": "test"},
        {"labels": False},
        {"label_column": "text"},
        {"captions": True},
        {"captions": True, "labels": False},
        {"image_size": 32},
        {"min_side": 4},
    ]
    keys = [HuggingFace(root=root, **chosen).key for chosen in options]
    assert len(set(keys)) == len(keys)
    assert HuggingFace(root=root).key == keys[0]
    os.utime(root / "data/train-00000-of-00002.parquet")
    assert HuggingFace(root=root).key != keys[0]


def test_without_the_package_the_way_is_told(tmp_path):
    code = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from sturdy.data.huggingface import HuggingFace\n"
        f"HuggingFace(root={str(tmp_path)!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'sturdy-diffusion[huggingface]'" in done.stderr.splitlines()[-1]


def test_nothing_of_datasets_is_imported():
    code = "import sys, sturdy.data.huggingface; print(*{'pyarrow', 'datasets'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
