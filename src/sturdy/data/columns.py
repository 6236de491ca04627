"""Which columns of a table of images have the images, their classes and their captions.

The package ``datasets`` writes the kinds of its columns into the files. Without them, the types of
the columns decide. Where several columns could be meant, the user is asked.
"""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import pyarrow as pa

KINDS = b"huggingface"  # the key of the schema's metadata
LABEL, TEXT = "label", "text"  # usual names of columns
BYTES, PATH = "bytes", "path"  # fields of an image


class ImageColumn(NamedTuple):
    """The column of the images.

    Attributes:
        name: of the column.
        field: the field with the bytes; empty if the column itself has them.
        path: the field with the name of the file; empty if there is none.
    """

    name: str
    field: str
    path: str


class LabelColumn(NamedTuple):
    """The column of the classes.

    Attributes:
        name: of the column.
        classes: the names of its numbers; empty if the column itself has the names.
    """

    name: str
    classes: tuple[str, ...]


def find_image_column(schema: "pa.Schema", given: str | None) -> ImageColumn:
    """Return the column of the images; ``given`` is its name, if the user gave one.

    Raises:
        ValueError: there is none, or there are several.
    """
    kinds = _kinds(schema)
    usable = {field.name: _as_image(field) for field in schema}
    found = [name for name, column in usable.items() if column and _kind(kinds, name) == "Image"]
    found = found or [name for name, column in usable.items() if column]
    if given is not None:
        _check_name("image_column", given, schema)
        found = [given]
    if len(found) > 1:
        raise ValueError(
            f"root=... has several columns of images: give one of "
            f"{', '.join(f'image_column={name}' for name in found)}"
        )
    column = usable[found[0]] if found else None
    if column is None:
        of_whom = "root=... has no column" if given is None else f"image_column={given} is none"
        raise ValueError(
            f"{of_whom} with the bytes of image files; the columns are {_describe(schema)}"
        )
    return column


def find_label_column(
    schema: "pa.Schema", given: str | None, labels: bool | str
) -> LabelColumn | None:
    """Return the column of the classes; ``given`` is its name, if the user gave one.

    Raises:
        ValueError: there are several, or none, and ``labels`` or ``given`` asks for one.
    """
    kinds = _kinds(schema)
    if labels is False:
        return None
    found = [field.name for field in schema if _kind(kinds, field.name) == "ClassLabel"]
    found = found or [name for name in label_choices(schema) if name == LABEL]
    if given is not None:
        _check_name("label_column", given, schema)
        if given not in label_choices(schema):
            raise ValueError(
                f"label_column={given} must have whole numbers or texts; the columns are "
                f"{_describe(schema)}"
            )
        found = [given]
    if len(found) > 1:
        options = [*(f"label_column={name}" for name in found), "labels=false"]
        raise ValueError(f"root=... has several columns of classes: give one of {_list(options)}")
    if not found:
        if labels is True:
            raise ValueError(
                f"labels=true, and root=... has no column of classes; the columns are "
                f"{_describe(schema)}: give label_column=NAME"
            )
        return None
    feature = kinds.get(found[0], {})
    names = feature.get("names") or [] if _kind(kinds, found[0]) == "ClassLabel" else []
    return LabelColumn(found[0], tuple(str(name) for name in names))


def find_caption_column(schema: "pa.Schema", given: str | None, label: str) -> str:
    """Return the column of the captions; ``given`` is its name, if the user gave one.

    Args:
        schema: of the table.
        given: a name, or ``None``.
        label: the column of the classes; empty if there is none.

    Raises:
        ValueError: there is none, or there are several.
    """
    texts = [field.name for field in schema if _is_text(field.type)]
    found = [name for name in texts if name != label]
    found = [TEXT] if TEXT in found else found
    if given is not None:
        _check_name("caption_column", given, schema)
        found = [name for name in texts if name == given]
    if len(found) > 1:
        raise ValueError(
            f"captions=true, and root=... has several columns of texts: give one of "
            f"{_list([f'caption_column={name}' for name in found])}"
        )
    if not found:
        raise ValueError(
            f"captions=true, and "
            f"{'root=... has no' if given is None else f'caption_column={given} is no'} column of "
            f"texts; the columns are {_describe(schema)}"
        )
    return found[0]


def label_choices(schema: "pa.Schema") -> list[str]:
    """Return the columns that could have classes."""
    import pyarrow.types as types

    return [f.name for f in schema if types.is_integer(f.type) or _is_text(f.type)]


def _as_image(field: "pa.Field") -> ImageColumn | None:
    import pyarrow.types as types

    if _is_binary(field.type):
        return ImageColumn(field.name, "", "")
    if not types.is_struct(field.type):
        return None
    inner = {field.type.field(k).name: field.type.field(k).type for k in range(len(field.type))}
    if BYTES not in inner or not _is_binary(inner[BYTES]):
        return None
    has_path = PATH in inner and _is_text(inner[PATH])
    return ImageColumn(field.name, BYTES, PATH if has_path else "")


def _is_binary(kind: "pa.DataType") -> bool:
    import pyarrow.types as types

    return types.is_binary(kind) or types.is_large_binary(kind)


def _is_text(kind: "pa.DataType") -> bool:
    import pyarrow.types as types

    if types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return types.is_string(kind) or types.is_large_string(kind)


def _kinds(schema: "pa.Schema") -> dict[str, Any]:
    """Return what the package ``datasets`` wrote of each column; empty if it wrote nothing."""
    try:
        kinds = json.loads((schema.metadata or {})[KINDS])["info"]["features"]
    except (KeyError, ValueError, TypeError, RecursionError):
        return {}
    return kinds if isinstance(kinds, dict) else {}


def _kind(kinds: dict[str, Any], name: str) -> str:
    kind = kinds.get(name)
    return str(kind.get("_type", "")) if isinstance(kind, dict) else ""


def _check_name(argument: str, name: str, schema: "pa.Schema") -> None:
    if name not in schema.names:
        raise ValueError(f"{argument}={name} is no column; the columns are {_describe(schema)}")


def _describe(schema: "pa.Schema") -> str:
    return _list([f"{field.name} ({str(field.type)[:40]})" for field in schema]) or "none"


def _list(items: Sequence[str]) -> str:
    return ", ".join(items)
