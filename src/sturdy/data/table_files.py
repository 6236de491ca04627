"""The Parquet and Arrow files of a folder, by subset, as the package ``datasets`` names them.

    data/train-00000-of-00002.parquet     train       downloaded from the hub
    train/data-00000-of-00001.arrow       train       save_to_disk of a DatasetDict
    data-00000-of-00001.arrow             (no name)   save_to_disk of a Dataset
    default/train/0000.parquet            default/train
    my-train-part.parquet                 train

Nothing is executed: scripts in such a folder are not read.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sturdy.data.classes import SPLIT_NAMES
from sturdy.data.listing import first_names, printable
from sturdy.data.roots import TABLE_SUFFIXES

SHARD = re.compile(r"(?P<name>.+?)-(?P<number>\d{5})-of-(?P<total>\d{5})(-[0-9a-f]+)?")
STATE = "state.json"  # in a folder of save_to_disk: names the files that belong to it
TRAINING = ("train", "training")


class TableFiles(NamedTuple):
    """The files of one subset.

    Attributes:
        subset: its name; empty if it has none.
        files: in the order of their rows.
        others: the names of the other subsets.
    """

    subset: str
    files: list[Path]
    others: list[str]


def find_table_files(root: Path, subset: str | None) -> TableFiles:
    """Return the files of ``subset``; of ``None``, the only subset or the one named train.

    Args:
        root: a folder, or one file.
        subset: as in ``"train"``.

    Raises:
        ValueError: there are no such files, some are missing, or it is not clear which are meant.
        OSError: a folder cannot be read.
    """
    found = {"": [root]} if root.is_file() else _by_subset(root)
    names = sorted(found)
    choices = first_names([f"subset={name}" for name in names if name], 8)
    if subset is None:
        training = [name for name in names if name.rpartition("/")[2] in TRAINING]
        chosen = names if len(names) == 1 else training
        if len(chosen) != 1:
            raise ValueError(
                f"root={printable(root)} has several subsets, and none or several are named train: "
                f"give one of {choices}"
            )
        subset = chosen[0]
    elif subset not in found:
        raise ValueError(f"subset={subset} is none of {printable(root)}: {choices or 'no names'}")
    files = sorted(found[subset])
    _check_complete(files)
    return TableFiles(subset, files, [name for name in names if name != subset])


def _by_subset(root: Path) -> dict[str, list[Path]]:
    """Return the Parquet and Arrow files under ``root`` by the name of their subset."""
    found: dict[str, list[Path]] = {}
    others: Counter[str] = Counter()
    for folder, folders, names in os.walk(root, onerror=_raise):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        current = _named_in_state(Path(folder))
        for name in sorted(names):
            path = Path(folder, name)
            is_cached = name.startswith(("cache-", "tmp", "."))  # results of datasets' map
            if path.suffix not in TABLE_SUFFIXES or is_cached:
                others[path.suffix] += 1
            elif current is None or name in current:
                found.setdefault(_subset(path.relative_to(root)), []).append(path)
    if not found:
        raise ValueError(_describe_empty(root, others))
    return found


def _named_in_state(folder: Path) -> list[str] | None:
    """Return the files that ``state.json`` names; others are left from an earlier save."""
    try:
        state = json.loads((folder / STATE).read_bytes())
        return [str(file["filename"]) for file in state["_data_files"]]
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _subset(path: Path) -> str:
    shard = SHARD.fullmatch(path.stem)
    name = path.stem
    if shard:
        name = shard["name"]
    else:
        words = re.split(r"[^a-z]+", path.stem.lower())
        name = next((word for word in words if word in SPLIT_NAMES), "data")
    return "/".join(part for part in [*path.parts[:-1], name] if part != "data")


def _check_complete(files: Sequence[Path]) -> None:
    """Raise ValueError if the name of a file says that there are more than are there."""
    suffixes = sorted({file.suffix for file in files})
    if len(suffixes) > 1:
        raise ValueError(
            f"root={printable(files[0].parent)} has files of {' and '.join(suffixes)} with the "
            f"same rows, or others: give the folder of one kind"
        )
    shards = [shard for file in files if (shard := SHARD.fullmatch(file.stem))]
    totals = {shard["total"] for shard in shards}
    if shards and (len(totals) > 1 or len(files) != int(shards[0]["total"])):
        raise ValueError(
            f"root={printable(files[0].parent)} has {len(files):,} files of {shards[0]['name']}, "
            f"such as {files[0].name}, which says that there are "
            f"{int(shards[0]['total']):,}: download it again"
        )


def _describe_empty(root: Path, others: Counter[str]) -> str:
    kinds = [f"{n:,} {suffix or 'without a suffix'}" for suffix, n in others.most_common(8)]
    script = ""
    if others[".py"]:
        script = "; a loading script is code, and is not run: convert the data set to Parquet"
    return (
        f"root={printable(root)} has no .parquet or .arrow files, and found "
        f"{', '.join(kinds) or 'no files at all'}{script}. data=folder reads folders of image files"
    )


def _raise(error: OSError) -> None:
    raise error
