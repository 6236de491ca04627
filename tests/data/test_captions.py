"""Captions and classes from tables and text files beside the images."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import Noise
from PIL import Image
from test_datamodule import Steps

from runs import COMMON, differences, kill_at, train
from sturdy.data.cache import Cache, open_cache
from sturdy.data.changes import describe_changes
from sturdy.data.datamodule import ImageData, folder_data
from sturdy.data.folder import Folder
from sturdy.data.listing import TextFile
from sturdy.data.metadata import peek_columns

SMALL_DIT = ["backbone=dit", "backbone.width=32", "backbone.depth=1", "backbone.heads=2"]


def put(path: Path, seed: int = 0, size: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def table(path: Path, **captions: str | None) -> None:
    """Write a ``metadata.jsonl``, in which ``a`` names ``a.png``."""
    rows = [{"file_name": f"{name}.png", "text": text} for name, text in captions.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """The images a.png to d.png."""
    for seed, name in enumerate("abcd"):
        put(tmp_path / "photos" / f"{name}.png", seed)
    return tmp_path / "photos"


def captions_of(folder: Folder) -> dict[str, str]:
    texts = [*folder.captions, ""]
    return {folder.name(i): texts[folder.caption(i)] for i in range(len(folder))}


def with_captions(root: Path, **options: object) -> Folder:
    return Folder(root=root, image_size=8, captions=True, **options)  # type: ignore[arg-type]


def refusal(root: Path, **options: object) -> str:
    with pytest.raises(ValueError, match=r".") as error:
        Folder(root=root, image_size=8, **options)  # type: ignore[arg-type]
    return str(error.value)


def opened(root: Path, expected_digest: str | None = None, **options: object) -> ImageData:
    data = folder_data(
        root=str(root), image_size=8, batch_size=4, cache=root.parent / "cache", **options
    )
    data.trainer = Steps()
    data.open(expected_digest)
    return data


# --- where captions come from


def test_a_table_comes_before_a_text_file_and_the_template_comes_last(photos: Path) -> None:
    table(photos / "metadata.jsonl", a="from the table", c=None)
    (photos / "a.txt").write_text("not this")
    (photos / "b.txt").write_text("  from\r\nthe\n file \n")
    folder = with_captions(photos, caption="a photo")
    assert captions_of(folder) == {
        "a.png": "from the table",
        "b.png": "from the file",
        "c.png": "a photo",
        "d.png": "a photo",
    }
    assert folder.summary_lines() == [
        f"{photos}: 4 images, no classes",
        'captions: 4 of 4 images (metadata.jsonl 1, .txt 1, caption="a photo" 2), 3 different; '
        'e.g. "from the table"',
        "not used: a.txt",
    ]


def test_distinct_captions_are_sorted_by_bytes_and_the_empty_one_comes_after(photos: Path) -> None:
    table(photos / "metadata.jsonl", a="é", b="z", c="", d="z")
    folder = with_captions(photos)
    assert folder.captions == ("z", "é")
    assert [folder.caption(i) for i in range(4)] == [1, 0, 2, 0]
    assert "4 of 4 images (metadata.jsonl 4), 2 different, 1 empty" in folder.summary_lines()[1]


def test_names_are_relative_to_the_folder_of_the_table(tmp_path: Path) -> None:
    for name in ("cats/1.png", "cats/old/2.png", "dogs/1.png"):
        put(tmp_path / "photos" / name)
    root = tmp_path / "photos"
    (root / "metadata.csv").write_text('file_name,text\ndogs\\1.png,"a dog, and\na ball"\n')
    (root / "cats/metadata.jsonl").write_text(
        '{"file_name": "./1.png", "text": "a cat"}\n\n{"file_name": "old/2.png", "text": 7}\n'
    )
    expected = {"cats/1.png": "a cat", "cats/old/2.png": "7", "dogs/1.png": "a dog, and a ball"}
    assert captions_of(with_captions(root)) == expected
    both = with_captions(root.parent, exclude=["cache"])
    assert captions_of(both) == {f"photos/{name}": text for name, text in expected.items()}
    put(tmp_path / "more/1.png")
    (tmp_path / "more/1.txt").write_text("more")
    several = Folder(root=[root, tmp_path / "more"], captions=True, labels=False)
    assert captions_of(several)["photos/cats/1.png"] == "a cat"
    assert captions_of(several)["more/1.png"] == "more"


def test_names_are_found_however_a_system_spells_them(photos: Path) -> None:
    decomposed = "e\u0301.png"  # as macOS may write it
    put(photos / decomposed)
    put(photos / "sub/f.png")
    rows = "é.png,x\nsub\\f.png,y\n" + "".join(f"{name}.png,z\n" for name in "abcd")
    (photos / "metadata.csv").write_text(f"file_name,text\n{rows}")
    found = captions_of(with_captions(photos, labels=False))
    assert found[decomposed] == "x"
    assert found["sub/f.png"] == "y"


def test_class_names_where_no_image_has_a_caption(tmp_path: Path) -> None:
    for name in ("cat/1.png", "dog/1.png"):
        put(tmp_path / name)
    assert with_captions(tmp_path).captions == ("a photo of a cat", "a photo of a dog")
    assert with_captions(tmp_path, caption="{}!").captions == ("cat!", "dog!")
    assert with_captions(tmp_path, caption="fixed").captions == ("fixed",)
    (tmp_path / "cat/1.txt").write_text("a cat")
    said = refusal(tmp_path, captions=True)
    assert said.startswith("captions=true, and 1 of 2 images have no caption (dog/1.png)")
    assert "'caption=\"a photo of a {}\"'" in said


def test_another_column_or_none(photos: Path) -> None:
    header = "file_name,text,long\n"
    rows = "".join(f"{name}.png,short {name},long {name}\n" for name in "abcd")
    (photos / "metadata.csv").write_bytes(b"\xef\xbb\xbf" + (header + rows).encode())
    assert with_captions(photos).captions[0] == "short a"
    assert with_captions(photos, caption_column="long").captions[0] == "long a"
    only_text_files = with_captions(photos, caption_column=None, caption="x")
    assert only_text_files.captions == ("x",)
    assert refusal(photos, captions=True, caption_column="prompt") == (
        f"caption_column=prompt is no column of {photos}/metadata.csv, which has: text, long; "
        "caption_column=null takes no captions from tables"
    )


def test_excluded_tables_and_text_files_are_not_read(photos: Path) -> None:
    table(photos / "metadata.jsonl", a="x", b="x", c="x", d="x")
    (photos / "a.txt").write_text("from the file")
    folder = with_captions(photos, exclude=["metadata.jsonl", "*.txt"], caption="none")
    assert folder.captions == ("none",)


# --- what is refused


def test_images_without_a_caption_are_named(photos: Path) -> None:
    for name in "efgh":
        put(photos / f"{name}.png")
    table(photos / "metadata.jsonl", a="a cat", nowhere="a dog", elsewhere="a bird")
    said = refusal(photos, captions=True)
    assert "7 of 8 images have no caption (b.png, c.png, d.png, e.png, f.png, ...)" in said
    assert "exclude=[...]" in said
    assert "'caption=\"a photo\"'" in said
    lines = with_captions(photos, caption="x").summary_lines()
    assert (
        "metadata.jsonl: 2 rows name no image that is there or used (nowhere.png, elsewhere.png)"
        in lines
    )


BROKEN = {
    "not JSON": ("metadata.jsonl", b'{"file_name": "a.png", "text": "x"}\n{"file_', "line 2"),
    "a list": ("metadata.jsonl", b'[{"file_name": "a.png"}]', "every line must be one object"),
    "nested too deeply": ("metadata.jsonl", b"[" * 200_000, "line 1: this is not JSON"),
    "several texts": (
        "metadata.jsonl",
        b'{"file_name": "a.png", "text": ["x", "y"]}',
        'line 1: text must be one text, and is ["x", "y"]',
    ),
    "half a character": (
        "metadata.jsonl",
        b'{"file_name": "a.png", "text": "\\ud800"}',
        "line 1: text has half a character",
    ),
    "no file name": ("metadata.jsonl", b'\n{"text": "x"}', "line 2: there is no file_name"),
    "the same image twice": (
        "metadata.csv",
        b"file_name,text\na.png,x\nb.png,y\n./a.png,x\n",
        "line 4: a.png has a row with text already",
    ),
    "Latin-1": ("metadata.csv", b"file_name,text\na.png,caf\xe9\n", "line 2: the byte 0xe9"),
    "UTF-16": ("metadata.csv", "file_name,text\n".encode("utf-16"), "is in UTF-16: save it in"),
    "semicolons": (
        "metadata.csv",
        b"file_name;text\na.png;x\n",
        "has no column file_name; its columns are: file_name;text; separate them by commas",
    ),
    "a comma too many": (
        "metadata.csv",
        b"file_name,text\na.png,a red, old truck\n",
        "line 2: 3 values for 2 columns; put a text with a comma in double quotes",
    ),
    "an open quote": ("metadata.csv", b'file_name,text\na.png,"x\n', "this is not CSV"),
    "two columns": ("metadata.csv", b"file_name,text,text\n", "has two columns text"),
    "nothing": ("metadata.jsonl", b"", "caption_column=text is no column of"),
    "a text file in Latin-1": ("a.txt", b"x\ncaf\xe9", "a.txt line 2: the byte 0xe9 is not UTF-8"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_named_with_the_line(photos: Path, case: str) -> None:
    name, content, message = BROKEN[case]
    (photos / name).write_bytes(content)
    said = refusal(photos, captions=True, caption="x")
    assert str(photos / name) in said
    assert message in said
    assert "\n" not in said
    Folder(root=photos)  # the control: without captions, the file is not read as a table


def test_arguments_that_contradict_each_other(photos: Path) -> None:
    assert refusal(photos, caption="x") == 'caption="x" is not used without captions=true'
    assert "no classes: leave out the {}" in refusal(photos, captions=True, caption="a {}")
    assert "all captions are empty" in refusal(photos, captions=True, caption=" ")
    assert "captions=yes must be one of true, false" in refusal(photos, captions="yes")
    assert "caption=7 must be a text" in refusal(photos, captions=True, caption=7)
    assert "label_column=breed" in refusal(photos, labels=True, label_column="breed")


# --- classes from a column


def test_classes_from_a_column(photos: Path) -> None:
    (photos / "metadata.csv").write_text(
        "file_name,breed,text\na.png,tabby,x\nb.png,persian,x\nc.png,tabby,y\nd.png, tabby ,y\n"
    )
    for name in ("train/e.png", "test/f.png"):  # which would else be asked about
        put(photos / name)
    with (photos / "metadata.csv").open("a") as file:
        file.write("train/e.png,10,y\ntest/f.png,9,y\n")
    folder = Folder(root=photos, image_size=8, label_column="breed")
    assert folder.classes == ("10", "9", "persian", "tabby")
    assert {folder.name(i): folder.label(i) for i in range(6)} == {
        "a.png": 3,
        "b.png": 2,
        "c.png": 3,
        "d.png": 3,
        "test/f.png": 1,
        "train/e.png": 0,
    }
    assert folder.summary_lines() == [
        f"{photos}: 6 images, classes: 10 1, 9 1, persian 1, tabby 3 (label_column=breed)"
    ]
    both = with_captions(photos, label_column="breed", caption_column=None)
    assert captions_of(both)["b.png"] == "a photo of a persian"
    assert refusal(photos, label_column="kind").endswith("which has: breed, text")


def test_images_without_a_class_are_named(photos: Path) -> None:
    assert "there is none under root=..." in refusal(photos, label_column="breed")
    (photos / "metadata.jsonl").write_text('{"file_name": "a.png", "breed": 0}\n')
    said = refusal(photos, label_column="breed")
    assert said.startswith(
        "label_column=breed has no value for 3 of 4 images (b.png, c.png, d.png): add them to "
        f"{photos}/metadata.jsonl"
    )


# --- what is said of files that are not used


def test_the_keys_that_would_use_a_file_are_named(photos: Path) -> None:
    (photos / "metadata.csv").write_text("file_name,text,breed\n")
    (photos / "a.txt").write_text("a cat")
    (photos / "labels.json").write_text("{}")
    assert Folder(root=photos).summary_lines()[1] == (
        "not used, as only folders give classes: metadata.csv, labels.json, a.txt; captions=true "
        "reads captions for a text condition from metadata.csv and the .txt of each image; "
        "label_column=NAME reads classes from a column of metadata.csv: text, breed"
    )


@pytest.mark.parametrize("content", [b"", b"[]", b"7", b"\xff\xfe{", b"{" * 99_999, b'"\x00'])
@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_any_table_may_lie_there_unused(photos: Path, name: str, content: bytes) -> None:
    (photos / name).write_bytes(content)
    assert isinstance(peek_columns(TextFile(name.encode(), bytes(photos / name))), list)
    assert len(Folder(root=photos)) == 4


# --- cache, digest and batches


def test_without_captions_keys_and_digests_are_those_of_older_versions(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The four values were computed before there were captions."""
    monkeypatch.setattr("sturdy.data.folder.DECODER", "decoder")
    monkeypatch.setattr("sturdy.data.listing.pack_status", lambda status: b"status")
    for k in range(6):
        put(tmp_path / "flat" / f"{k}.png", k)
        put(tmp_path / "classes" / "ab"[k % 2] / f"{k}.png", k)
    (tmp_path / "flat/metadata.csv").write_text("file_name,text\n")
    found = {}
    for name in ("flat", "classes"):
        folder = Folder(root=tmp_path / name, image_size=8)
        cache = open_cache(folder, root=tmp_path / "cache")
        found[name] = (folder.key, cache.digest_with_contents)
        assert not list(cache.path.glob("captions*"))
        assert (cache.captions, cache.caption_rows) == ([], None)
    assert found == {
        "flat": (
            "788cf73eaae1bf85f593058491d1ee76",
            "263f2af2a7a697e32ef64a64153e87a03b6fee0b6ea384f6264d0c14e61dde1b",
        ),
        "classes": (
            "1354ce6f330714976866feac14eeae1e",
            "093eba1b4cd2fdb09787c25d127119af2178b9cdb336ac26b39efb8f25b4b864",
        ),
    }


def test_one_changed_caption_is_another_key_and_digest_and_is_named(photos: Path) -> None:
    table(photos / "metadata.jsonl", a="x", b="x", c="y")
    (photos / "d.txt").write_text("y")
    first = opened(photos, captions=True)
    again = opened(photos, captions=True)
    assert (again.digest, again.cache.path) == (first.digest, first.cache.path)
    without = opened(photos)
    (photos / "d.txt").write_text("x")
    second = opened(photos, captions=True)
    assert second.captions == first.captions  # only a row is another
    assert len({first.digest, second.digest, without.digest}) == 3
    assert len({first.cache.key, second.cache.key, without.cache.key}) == 3
    assert describe_changes(first.cache, second.cache) == ["1 caption changed (d.png)"]
    assert describe_changes(without.cache, second.cache) == [
        "there were no captions, and there are 2"
    ]
    old = opened(photos, first.digest, captions=True)
    assert old.digest == first.digest
    assert old.notes == ["1 caption changed; the old one is used (d.png)"]


def test_an_image_without_its_caption_is_no_obstacle_for_a_run_that_began(photos: Path) -> None:
    table(photos / "metadata.jsonl", a="x", b="x", c="y", d="y")
    first = opened(photos, captions=True)
    put(photos / "e.png", 9)
    with pytest.raises(ValueError, match=r"1 of 5 images have no caption"):
        opened(photos, captions=True)
    again = opened(photos, first.digest, captions=True)
    assert (again.digest, again.captions) == (first.digest, ["x", "y"])


def test_a_moved_folder_has_the_same_digest(photos: Path) -> None:
    (photos / "metadata.csv").write_text(
        "file_name,text,breed\na.png,x,p\nb.png,,q\nc.png,y,p\nd.png,z,q\n"
    )
    options = {"captions": True, "label_column": "breed"}
    digest = opened(photos, **options).digest
    copy = Path(shutil.copytree(photos, photos.parent / "elsewhere/copy"))
    shutil.rmtree(photos)
    assert opened(copy, **options).digest == digest
    text = (copy / "metadata.csv").read_text()
    (copy / "metadata.csv").write_text(text.replace("c.png,y,p", "c.png,y,q"))
    changed = opened(copy, **options)
    assert changed.digest != digest  # the control: a class is another
    assert changed.notes == []
    assert changed.source is not None
    assert opened(copy, label_column="breed").digest != changed.digest


def test_a_batch_has_rows_of_captions_and_evaluation_has_classes(photos: Path) -> None:
    (photos / "metadata.csv").write_text(
        "file_name,text,breed\na.png,x,p\nb.png,,q\nc.png,y,p\nd.png,x,q\n"
    )
    data = opened(photos, captions=True, label_column="breed", holdout=0.3)
    assert (data.captions, list(data.classes)) == (["x", "y"], ["p", "q"])
    assert data.prior == [0.5, 0.5]
    images = data.val_dataloader().dataset
    positions = np.arange(4)
    batch = images[positions]
    names = [data.cache.names[i] for i in data.split.indices(positions)]
    rows = {"a.png": 0, "b.png": 2, "c.png": 1, "d.png": 0}
    breeds = {"a.png": 0, "b.png": 1, "c.png": 0, "d.png": 1}
    assert torch.equal(batch.label, torch.tensor([rows[name] for name in names]))
    assert torch.equal(images.classes(positions), torch.tensor([breeds[name] for name in names]))
    assert [data.cache.caption(data.cache.names.index(name)) for name in "a.png b.png".split()] == [
        "x",
        "",
    ]
    assert Cache(data.cache.path).captions == data.captions


def test_broken_images_take_no_other_image_s_caption(photos: Path) -> None:
    table(photos / "metadata.jsonl", a="w", b="x", c="y", d="z")
    (photos / "b.png").write_bytes(b"")
    data = opened(photos, captions=True, max_broken=1)
    cache = data.cache
    assert [cache.caption(i) for i in range(3)] == ["w", "y", "z"]
    assert cache.names == ["a.png", "c.png", "d.png"]


class Captioned(Noise):
    """A source of one's own with captions."""

    captions = ("even number", "odd number")

    def __init__(self, last: int = 2) -> None:
        super().__init__(n=10, key=f"captioned {last}")
        self.last = last

    def caption(self, index: int) -> int:
        return self.last if index == 9 else index % 2


def test_a_source_of_ones_own_may_have_captions(tmp_path: Path) -> None:
    data = ImageData(Captioned(), image_size=8, cache=tmp_path)
    data.open()
    assert data.captions == ["even number", "odd number"]
    assert [data.cache.caption(i) for i in (0, 1, 9)] == ["even number", "odd number", ""]
    with pytest.raises(ValueError, match=r"caption\(\) of an image gives a row out of \[0, 2\]"):
        ImageData(Captioned(last=3), image_size=8, cache=tmp_path).open()


# --- a run


@pytest.mark.slow
def test_a_run_on_classes_from_a_column_is_killed_and_goes_on(tmp_path: Path) -> None:
    words = [word for word in COMMON if not word.startswith(("data.source", "backbone."))]
    root = tmp_path / "photos"
    for k in range(40):
        put(root / f"{k:02d}.png", k, size=16)
    rows = [f"{k:02d}.png,{['tabby', 'persian', 'siamese'][k % 3]}\n" for k in range(40)]
    (root / "metadata.csv").write_text("file_name,breed\n" + "".join(rows))
    base = [*words, *SMALL_DIT, "data=folder", f"data.root={root}", "data.label_column=breed"]
    said = train(tmp_path, "whole", base=base)
    lines = (said.stdout + said.stderr).splitlines()
    assert (
        f"{root}: 40 images, classes: persian 13, siamese 13, tabby 14 (data.label_column=breed)"
        in lines
    )
    kill_at(tmp_path, "killed", 6, base=base, saved=True)
    moved = root.rename(tmp_path / "moved")
    base = [word.replace(str(root), str(moved)) for word in base]
    # rows in another order are the same classes
    (moved / "metadata.csv").write_text("file_name,breed\n" + "".join([*rows[1:], rows[0]]))
    train(tmp_path, "killed", base=base)
    assert differences(tmp_path, "whole", "killed") == []

    text = (moved / "metadata.csv").read_text().replace("07.png,persian", "07.png,tabby")
    (moved / "metadata.csv").write_text(text)
    refused = train(tmp_path, "killed", "trainer.max_steps=15", base=base, code=2)
    assert "1 image has another class (07.png: persian -> tabby)" in refused.stderr
    refused = train(tmp_path, "other", "data.label_column=kind", base=base, code=2)
    assert f"data.label_column=kind is no column of {moved}/metadata.csv" in refused.stderr
    assert "Traceback" not in refused.stderr
