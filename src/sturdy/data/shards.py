"""Make shards of a folder, and the index of shards.

    python -m sturdy.data.shards pack FOLDER OUT
    python -m sturdy.data.shards index SHARDS [OUT]

Shards have the layout of webdataset, whose tools read them: ``.cls`` is the number of the class,
``.txt`` the caption, and ``.json`` has the name of the image and of its class. ``index`` reads and
decodes every image once. It takes the shards of others, too. Both go on where they were killed, and
``index`` reads only what is new.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from exact_resume.files import atomic_write, make_directory
from sturdy.data.cache import MAX_LISTED, lock_folder
from sturdy.data.checks import check_int
from sturdy.data.folder import Folder
from sturdy.data.shard_index import INDEX, ShardIndex
from sturdy.data.shard_indexing import ANY_IMAGE, index_shards, is_image_suffix
from sturdy.data.shard_store import ShardStore
from sturdy.data.source import BadImageError
from sturdy.progress import ProgressPrinter

INSTALL = "pip install 'sturdy-diffusion[stream]'"
PER_SHARD = 1000  # images
PACKING = "packing.json"  # what the shards in a folder are made of
EXIT_USAGE = 2
FOLDER_OPTIONS = (
    *("labels", "exclude", "any_suffix", "label_column", "captions", "caption_column", "caption"),
    *("per_shard",),
)
INDEX_OPTIONS = ("label_column", "caption_column", "suffix")


def pack(
    folder: Folder, out: Path, *, per_shard: int = PER_SHARD, progress: Callable[[int, int], None]
) -> None:
    """Copy the images of ``folder`` into shards in ``out``, in the order of the folder.

    A shard that is there is complete, and is not written again.

    Args:
        folder: the images, with classes and captions.
        out: a new or empty folder, or one that this function was killed in.
        per_shard: images of a shard.
        progress: called with ``(done, total)``.

    Raises:
        ValueError: ``out`` has other files, or shards of other images.
        OSError: it cannot be written.
    """
    from webdataset.writer import TarWriter

    check_int("per_shard", per_shard)
    make_directory(out)
    expected = {"key": folder.key, "per_shard": per_shard}
    _check_same_images(out, expected)
    with lock_folder(out / f".{PACKING}.lock"):
        with atomic_write(out / PACKING) as file:
            file.write(json.dumps(expected).encode())
        for number, start in enumerate(range(0, len(folder), per_shard)):
            path = out / f"{number:06d}.tar"
            images = range(start, min(start + per_shard, len(folder)))
            if not path.exists():
                with atomic_write(path) as file, TarWriter(file, encoder=False, mtime=0) as tar:
                    for index in images:
                        tar.write(_sample(folder, index))
            progress(images.stop, len(folder))


def _check_same_images(out: Path, expected: dict[str, Any]) -> None:
    """Raise ValueError if there are shards of other images, or files of others, in ``out``."""
    path = out / PACKING
    if path.exists():
        if json.loads(path.read_bytes()) == expected:
            return
        raise ValueError(
            f"{out} has shards of other images, or was made with other options, or the folder "
            f"changed since: give a new folder, and index what is new beside the old"
        )
    if found := [name for name in os.listdir(out) if not name.startswith(".")]:
        raise ValueError(f"{out} is not empty ({sorted(found)[0]}): give a new folder")


def _sample(folder: Folder, index: int) -> dict[str, Any]:
    """Return a sample of webdataset, all bytes. A file that cannot be read is in ``.json`` only."""
    name = folder.name(index)
    about: dict[str, Any] = {"name": name}
    sample: dict[str, Any] = {"__key__": f"{index:09d}"}
    if folder.classes:
        label = folder.label(index)
        about["class"] = folder.classes[label]
        sample["cls"] = str(label).encode()
    if folder.captions:
        sample["txt"] = (*folder.captions, "")[folder.caption(index)].encode()
    try:
        sample[_suffix(name)] = folder.content(index)
    except BadImageError as error:
        about["broken"] = str(error)
    sample["json"] = json.dumps(about).encode()
    return sample


def _suffix(name: str) -> str:
    """Return the suffix of a file of an image, without the dot."""
    suffix = os.path.splitext(name)[1].lower()[1:]
    return suffix if is_image_suffix(suffix) else ANY_IMAGE


def main(words: Sequence[str]) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m sturdy.data.shards", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="copy a folder of images into shards")
    packing.add_argument("folder", help="as data.root of data=folder")
    packing.add_argument("out", type=Path, help="a new folder")
    packing.add_argument(
        "options",
        nargs="*",
        metavar="KEY=VALUE",
        help="keys of data=folder that say which images, classes and captions there are, such as "
        f"captions=true; and per_shard={PER_SHARD}, the images of a shard",
    )
    indexing = commands.add_parser("index", help="read shards that are there, and index them")
    indexing.add_argument("shards", help="a folder or a URL")
    indexing.add_argument("out", type=Path, nargs="?", help="where the index goes; else beside")
    indexing.add_argument(
        "options",
        nargs="*",
        metavar="KEY=VALUE",
        help="label_column=class and caption_column=text: keys of the .json files, or null for "
        "none; suffix=jpg: of the images, where samples have several",
    )
    given = parser.parse_args(words)
    try:
        if given.command == "pack":
            _pack(given.folder, given.out, parse_options(given.options))
        else:
            options = list(given.options)
            out = given.out
            if out is not None and "=" in str(out):
                options.insert(0, str(out))
                out = None
            _index(given.shards, out, parse_options(options))
    except (ValueError, OSError, ImportError) as error:
        if isinstance(error, ImportError):
            error = ImportError(f"shards need webdataset ({error}): {INSTALL}")
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    return 0


def _pack(root: str, out: Path, options: dict[str, Any]) -> None:
    per_shard = options.pop("per_shard", PER_SHARD)
    _check_names(options, FOLDER_OPTIONS)
    folder = Folder(root=root, **options)
    for line in folder.summary_lines():
        print(line)
    with ProgressPrinter("packing images") as progress:
        pack(folder, out, per_shard=per_shard, progress=progress)
    _index(str(out), None, {})


def _index(root: str, out: Path | None, options: dict[str, Any]) -> None:
    _check_names(options, INDEX_OPTIONS)
    store = ShardStore(root)
    if out is None and store.is_remote:
        raise ValueError(
            f"{root} is only read: give a folder for the index, too, and copy its {INDEX} beside "
            f"the shards"
        )
    out = out or Path(store.root)
    with ProgressPrinter("indexing shards") as progress:
        whole = index_shards(store, out, **options, progress=progress)
    print(describe(whole, out))


def describe(index: ShardIndex, out: Path) -> str:
    """Say in a few lines what was indexed, and which images are broken."""
    size = sum(shard.size for shard in index.shards)
    lines = [
        f"{out / INDEX}: {len(index.samples):,} images in {len(index.shards):,} shards of "
        f"{size / 1e6:,.1f} MB, {len(index.classes):,} classes, {len(index.captions):,} captions"
    ]
    if index.broken:
        lines.append(f"{len(index.broken):,} images are left out:")
        lines += [f"  {name}  {reason}" for name, reason in index.broken[:MAX_LISTED]]
        if len(index.broken) > MAX_LISTED:
            lines.append("  ...")
    return "\n".join(lines)


def parse_options(words: Sequence[str]) -> dict[str, Any]:
    """Return the values of ``key=value`` words, as YAML reads them."""
    options = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"{word} is not of the form key=value")
        options[key.removeprefix("data.")] = yaml.safe_load(value)
    return options


def _check_names(options: dict[str, Any], known: Sequence[str]) -> None:
    for name in options:
        if name not in known:
            raise ValueError(f"there is no option {name}=; there are {', '.join(known)}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
