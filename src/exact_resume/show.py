"""Print what a file of weights holds, for ``python -m exact_resume show``; nothing is executed.

What the weights mean is not known here. Packages add lines by an entry point of the group
``exact_resume.describe``: a function that takes a ``WeightsFile`` and returns lines.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import entry_points
from pathlib import Path

from torch import Tensor

from exact_resume.checkpoint.store import (
    MANIFEST,
    STATE,
    CorruptCheckpointError,
    NoValidCheckpointError,
    Store,
    verify_checkpoint,
)
from exact_resume.pickle_names import is_harmless
from exact_resume.weights_file import WeightsFile, WeightsFileError, open_weights, printable

HOOKS = "exact_resume.describe"
SUFFIXES = {".safetensors", ".ckpt", ".pt", ".pth", ".bin"}
FACT = "{:<12}{}"
ROW = "{:<32}  {:>7}  {:>15}  {}"
PART = "{:<52}  {:>12}  {:>15}  {}"
LONGEST = 60  # characters of a value
MOST = 20  # values, or modules
AVERAGE = re.compile(r"(^|_)ema(_|$)")  # a module with averaged weights, such as ``model_ema``


def show(path: Path) -> int:
    """Print what ``path`` holds; return the exit code.

    Args:
        path: a file of weights, a checkpoint, a run (its newest checkpoint) or a folder with files
            of weights.
    """
    try:
        if not path.is_dir():
            return _show_file(path)
        if (path / STATE).exists():
            return _show_file(path / STATE)
        store = Store(path / "checkpoints")
        if steps := store.steps():
            return _show_file(store.state(steps[-1]))
        return _show_folder(path)
    except FileNotFoundError:
        print(f"error: {path} is not there; give a file of weights", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {path} cannot be read: {error.strerror}", file=sys.stderr)
        return 2


def _show_file(path: Path) -> int:
    size = path.stat().st_size
    problem = _find_damage(path)
    try:
        file = open_weights(path)
    except WeightsFileError as error:
        print(f"refused: {error}")
        for name in sorted(error.imports, key=is_harmless):  # the refused ones first
            _print_fact("imports", f"{name} ({'harmless' if is_harmless(name) else 'REFUSED'})")
        return 1
    print(printable(str(path)))
    _print_fact("format", f"{file.format}, {_format_size(size)}")
    if (path.parent / MANIFEST).exists():
        _print_fact("verified", f"NO: {problem}" if problem else f"yes, by its {MANIFEST}")
    if file.step is not None:
        _print_fact("step", f"{file.step:,}")
    for line in _ask_hooks(file):
        print(printable(line))
    for name in file.imports:
        _print_fact("imports", f"{name} (harmless; left out)")
    if file.entries:
        _print_fact("entries", ", ".join(file.entries))
    _print_metadata(file.metadata)
    _print_modules(file.tensors)
    return 1 if problem else 0


def _find_damage(path: Path) -> str:
    """Return why a checkpoint does not match its manifest; '' if it does or has none."""
    if path.name == STATE and (path.parent / MANIFEST).exists():
        try:
            verify_checkpoint(path.parent)
        except (CorruptCheckpointError, NoValidCheckpointError) as error:
            return str(error)
    return ""


def _ask_hooks(file: WeightsFile) -> Iterator[str]:
    """Yield the lines that other packages say about ``file``."""
    for hook in entry_points(group=HOOKS):
        try:
            yield from list(hook.load()(file))
        except Exception as error:  # it is no reason to say nothing else
            yield FACT.format("note", f"{hook.value} failed: {error}")


def _print_metadata(metadata: Mapping[str, str]) -> None:
    for name, value in sorted(metadata.items())[:MOST]:
        text = value if len(value) <= LONGEST else f"{value[:LONGEST]}..."
        _print_fact("metadata", f"{name}: {text}")
    if len(metadata) > MOST:
        _print_fact("metadata", f"... and {len(metadata) - MOST} more")


def _print_modules(tensors: Mapping[str, Tensor]) -> None:
    """Print a line for each module at the top: tensors, parameters and dtypes; and the sums."""
    modules: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():
        module, dot, _ = name.partition(".")
        modules.setdefault(module if dot else "(no module)", []).append(tensor)
    averages = [name for name in modules if AVERAGE.search(name)]
    _print_fact("averages", f"yes (EMA): {', '.join(averages)}" if averages else "no (EMA)")
    print()
    print(ROW.format("module", "tensors", "parameters", "dtype"))
    rows = sorted(modules.items(), key=lambda row: -_count(row[1]))
    for name, own in rows[:MOST]:
        _print_row(name, own)
    if rest := [tensor for _, own in rows[MOST:] for tensor in own]:
        _print_row(f"... and {len(rows) - MOST} more modules", rest)
    _print_row("total", tensors.values())


def _print_row(name: str, tensors: Iterable[Tensor]) -> None:
    tensors = list(tensors)
    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)
    names = ", ".join(name for name, _ in dtypes.most_common())
    print(printable(ROW.format(name, f"{len(tensors):,}", f"{_count(tensors):,}", names)))


def _show_folder(folder: Path) -> int:
    """Print a line for each file of weights in ``folder`` and in the folders right below it."""
    found = [path for path in folder.glob("*") if path.suffix in SUFFIXES]
    found += [path for path in folder.glob("*/*") if path.suffix in SUFFIXES]
    if not found:
        print(f"error: {folder} holds no files of weights, no checkpoint and no run")
        return 1
    print(printable(str(folder)))
    print(PART.format("file", "size", "parameters", "class"))
    refused = []
    for path in sorted(found):
        name = str(path.relative_to(folder))
        try:
            count = f"{_count(open_weights(path).tensors.values()):,}"
        except WeightsFileError as error:
            count = "refused"
            refused.append(f"refused: {error}")
        size = _format_size(path.stat().st_size)
        print(printable(PART.format(name, size, count, _read_class(path.parent))).rstrip())
    for line in refused:
        print(line)
    return 1 if refused else 0


def _read_class(folder: Path) -> str:
    """Return the class that ``config.json`` in ``folder`` names; '' if it names none."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
        return str(config.get("_class_name") or config["architectures"][0])
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return ""


def _print_fact(name: str, text: str) -> None:
    print(printable(FACT.format(name, text)))


def _count(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _format_size(size: int) -> str:
    for unit, bytes_each in (("GB", 1e9), ("MB", 1e6)):
        if size >= bytes_each:
            return f"{size / bytes_each:,.2f} {unit}"
    return f"{size / 1e3:,.1f} kB"
