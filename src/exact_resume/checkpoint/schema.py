"""The schema of a checkpoint: the one list of what ``state.ckpt`` and ``manifest.json`` contain.

    save      refuses an entry that is not declared here, or that has another type
    load      names a required entry that is missing
    compare   compares every entry bit by bit, unless it is declared with ``compared=False``
    docs      show ``markdown_table()``

To add a value to the checkpoint, declare it once, in the module of the class that writes it:

    from exact_resume.checkpoint.schema import Entry, declare
    declare(Entry("queue", list, "samples that wait", written_by="MyCallback"))

A callback writes it in ``on_save_checkpoint(trainer, module, checkpoint)``, with
``checkpoint["queue"] = self.queue``, and reads it in ``on_load_checkpoint`` with the same
arguments. A LightningModule has the same two hooks, with ``checkpoint`` alone.

Only the top level is declared; the writer of an entry decides what lies below it. Everything is a
tensor or a primitive, at any depth, so that loading never executes code.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Any

from torch import Tensor

PARTS = "parts"  # the entry that only a sharded checkpoint has
STORED_PATH = "stored_path"  # attribute of a tensor whose bytes are in the parts
FORMAT = 2  # raised when a name inside a checkpoint changes; see checkpoint/renames.py


class SchemaError(ValueError):
    """A checkpoint to be saved has an entry that the schema does not declare like this."""


@dataclass(frozen=True)
class Entry:
    """One entry at the top level of a checkpoint.

    Attributes:
        name: the key.
        type: of the value, after ``isinstance``.
        meaning: in a few words, for the documentation.
        written_by: who puts it there.
        required: whether a run cannot continue without it.
        compared: whether it is part of the trajectory, so that two runs of the same trajectory must
            have the same bits in it.
    """

    name: str
    type: type | UnionType
    meaning: str
    written_by: str
    required: bool = False
    compared: bool = True


def _by_name(*entries: Entry) -> dict[str, Entry]:
    return {entry.name: entry for entry in entries}


# Lightning stores the state of a data module and of a precision plugin under the name of its
# class, such as ``ImageData``. These two entries declare all such names.
# fmt: off
DATA_MODULE = Entry(
    "<class of the data module>", dict, written_by="LightningDataModule.state_dict",
    meaning="where the data goes on: optimizer steps done and the position of the next sample")
PRECISION = Entry(
    "<class of the precision plugin>", dict, written_by="Lightning",
    meaning="the scale of the loss in half precision")

STATE_ENTRIES = _by_name(
    Entry("state_dict", dict, written_by="Lightning", required=True,
          meaning="weights and averages by name"),
    Entry("optimizer_states", list, written_by="Lightning", required=True,
          meaning="the state of each optimizer"),
    Entry("global_step", int, written_by="Lightning", required=True,
          meaning="optimizer steps done"),
    Entry("lr_schedulers", list, written_by="Lightning", required=True,
          meaning="the state of each learning rate scheduler"),
    Entry("loops", dict, written_by="Lightning", required=True, compared=False,
          meaning="progress of Lightning's loops"),
    Entry("pytorch-lightning_version", str, written_by="Lightning", required=True, compared=False,
          meaning="the version that wrote the file; Lightning migrates older ones"),
    Entry("epoch", int, written_by="Lightning", compared=False,
          meaning="epochs done; an endless epoch counts as one"),
    Entry("callbacks", dict, written_by="Lightning",
          meaning="the state of each callback"),
    DATA_MODULE,
    PRECISION,
    Entry("hyper_parameters", dict, written_by="save_hyperparameters", compared=False,
          meaning="arguments of the module"),
    Entry("hparams_name", str, written_by="save_hyperparameters", compared=False,
          meaning="the argument of the module that holds them"),
    Entry("datamodule_hyper_parameters", dict, written_by="save_hyperparameters", compared=False,
          meaning="arguments of the data module"),
    Entry("datamodule_hparams_name", str, written_by="save_hyperparameters", compared=False,
          meaning="the argument of the data module that holds them"),
    Entry("averaging_state", dict, written_by="Lightning's WeightAveraging",
          meaning="the progress of weight averaging"),
    Entry("current_model_state", dict, written_by="Lightning's WeightAveraging",
          meaning="the weights that are being averaged"),
    Entry("format", int, written_by="StoreCheckpointIO", compared=False,
          meaning="the version of the names in this file"),
    Entry(PARTS, dict, written_by="StoreCheckpointIO", compared=False,
          meaning="bytes and SHA-256 of the files with the tensors, if the checkpoint is sharded"),
    Entry("config", dict | None, written_by="the application", compared=False,
          meaning="the resolved config; the module can be rebuilt from it"),
    Entry("init_from", dict, written_by="the application", compared=False,
          meaning="path and SHA-256 of the checkpoint that the run began from"),
)

MANIFEST_ENTRIES = _by_name(
    Entry("format", int, written_by="Store.commit", required=True,
          meaning="as in state.ckpt"),
    Entry("step", int, written_by="Store.commit", required=True,
          meaning="optimizer steps done"),
    Entry("files", dict, written_by="Store.commit", required=True,
          meaning="bytes and SHA-256 of each file"),
    Entry("sha256", str, written_by="Store.commit", required=True,
          meaning="hash of the other entries of the manifest"),
    Entry("time", float, written_by="Store.commit",
          meaning="when the checkpoint was written, in seconds since 1970"),
    Entry("position", int, written_by="the application",
          meaning="samples handed out"),
    Entry("fingerprint", dict, written_by="the application",
          meaning="config, data, code, files and stack: what makes two runs the same trajectory"),
    Entry("init_from", dict, written_by="the application",
          meaning="as in state.ckpt"),
    Entry("trajectories", list, written_by="the application",
          meaning="where a changed run was continued on purpose: step, data before, reasons"),
)
# fmt: on


def declare(entry: Entry, table: dict[str, Entry] = STATE_ENTRIES) -> None:
    """Add ``entry`` to the schema, so that it may be saved.

    Args:
        entry: to add; adding it twice is no error.
        table: ``STATE_ENTRIES`` for a value in ``state.ckpt``, ``MANIFEST_ENTRIES`` for one in
            ``manifest.json``.

    Raises:
        SchemaError: if another entry has this name.
    """
    if table.setdefault(entry.name, entry) != entry:
        raise SchemaError(f"{entry.name!r} is declared already, as {table[entry.name]}")


def check_declared(content: Mapping[str, Any], table: Mapping[str, Entry] = STATE_ENTRIES) -> None:
    """Check that every entry of ``content`` is declared in ``table``, with this type.

    Raises:
        SchemaError: naming the first one that is not, and how to declare it.
    """
    for name, value in content.items():
        entry = table.get(name) or _entry_of_class(name)
        if entry is None:
            raise SchemaError(
                f"the checkpoint has an entry {name!r} that its schema does not declare. Add to "
                f"the module that writes it: from exact_resume.checkpoint.schema import Entry, "
                f"declare; declare(Entry({name!r}, {type(value).__name__}, 'its meaning', "
                f"'its writer'))"
            )
        if not isinstance(value, entry.type):
            raise SchemaError(
                f"the entry {name!r} of the checkpoint is a {type(value).__name__}, but it is "
                f"declared as {_type_name(entry)}"
            )


def assert_primitive(value: Any, where: str) -> None:
    """Check that ``value`` holds only tensors and primitives.

    Args:
        value: anything, at any depth of mappings, lists, tuples and sets.
        where: the name of ``value``, for the message.

    Raises:
        TypeError: naming the first value that is neither.
    """
    if isinstance(value, Mapping):
        for k, v in value.items():
            assert_primitive(k, f"a key of {where}")
            assert_primitive(v, f"{where}[{k!r}]")
    elif isinstance(value, list | tuple | set):
        for i, v in enumerate(value):
            assert_primitive(v, f"{where}[{i}]")
    elif not isinstance(value, Tensor | str | bytes | int | float | bool | None):
        raise TypeError(
            f"{where} is a {type(value).__qualname__}; checkpoints hold tensors and primitives only"
        )


def map_leaves(change: Callable[[str, Any], Any], value: Any, path: str = "") -> Any:
    """Return nested ``value`` with ``change(path, leaf)`` in place of each leaf.

    Args:
        change: called with the path of a leaf, such as ``state_dict/layer.weight``, and the leaf.
        value: mappings, lists and tuples, at any depth.
        path: of ``value``.
    """
    above = f"{path}/" if path else ""
    if isinstance(value, Mapping):
        return {k: map_leaves(change, v, f"{above}{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([map_leaves(change, v, f"{above}{i}") for i, v in enumerate(value)])
    return change(path, value)


def missing_entries(
    content: Mapping[str, Any], table: Mapping[str, Entry] = STATE_ENTRIES
) -> list[str]:
    """Return the names of the required entries that ``content`` lacks."""
    return [entry.name for entry in table.values() if entry.required and entry.name not in content]


def is_compared(name: str) -> bool:
    """Return whether the entry ``name`` of two equal runs must be equal.

    An entry that this process does not know is compared: its module may not be imported here.
    """
    entry = STATE_ENTRIES.get(name)
    return entry is None or entry.compared


def markdown_table(table: Mapping[str, Entry] = STATE_ENTRIES) -> str:
    """Return the entries of ``table`` as a Markdown table, for the documentation."""
    lines = [
        "| entry | type | meaning | written by | required | compared |",
        "|---|---|---|---|---|---|",
    ]
    for entry in table.values():
        required = "yes" if entry.required else ""
        compared = "yes" if entry.compared else ""
        lines.append(
            f"| `{entry.name}` | {_type_name(entry)} | {entry.meaning} | {entry.written_by} "
            f"| {required} | {compared} |"
        )
    return "\n".join(lines) + "\n"


def _entry_of_class(name: str) -> Entry | None:
    """Return the entry that declares the state of the class ``name``; None if there is none."""
    # Imported here: only a process that saves needs Lightning, and it has imported it already.
    from lightning.pytorch import LightningDataModule
    from lightning.pytorch.plugins import Precision

    if name in _subclass_names(LightningDataModule):
        return DATA_MODULE
    if name in _subclass_names(Precision):
        return PRECISION
    return None


def _subclass_names(base: type) -> Iterator[str]:
    subclasses: list[type] = base.__subclasses__()
    for subclass in subclasses:
        yield subclass.__qualname__
        yield from _subclass_names(subclass)


def _type_name(entry: Entry) -> str:
    if isinstance(entry.type, type):
        return entry.type.__name__
    return str(entry.type).replace(" | ", " or ")  # a bar would end a cell of the table
