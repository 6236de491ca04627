"""Tables about images, in the layout of Hugging Face's imagefolder.

    metadata.jsonl   {"file_name": "cats/1.jpg", "text": "a cat in the sun", "breed": "tabby"}
    metadata.csv     file_name,text,breed

A table may lie in any folder. Its file names are relative to that folder.
"""

import csv
import io
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

from sturdy.data.listing import MAX_KINDS, Listing, TextFile, first_names, printable
from sturdy.data.source import BadImageError

FILE_NAME = "file_name"
HEAD = 1 << 16  # bytes that are read to name the columns of a table that is not used
MAX_TEXT = 1 << 30  # bytes of a text; an archive may claim any size
UTF16 = (b"\xff\xfe", b"\xfe\xff")


class Column(NamedTuple):
    """One column of the tables of a folder.

    Attributes:
        values: by the name of the image; white space is single blanks.
        tables: the tables that have the column.
        counts: number of images by the name of the table's file.
        unknown: the rows that name none of the images, as file names.
    """

    values: dict[bytes, str]
    tables: list[TextFile]
    counts: Counter[str]
    unknown: list[bytes]

    def notes(self) -> list[str]:
        """Say which rows name none of the images."""
        if not self.unknown:
            return []
        kinds = " and ".join(sorted({os.path.basename(t.name).decode() for t in self.tables}))
        names = first_names([printable(name) for name in self.unknown])
        rows = "1 row names" if len(self.unknown) == 1 else f"{len(self.unknown):,} rows name"
        return [f"{kinds}: {rows} no image that is there or used ({names})"]


def read_column(
    argument: str,
    column: str,
    tables: Sequence[TextFile],
    images: Collection[bytes],
    *,
    hint: str = "",
) -> Column:
    """Read one column of all tables; an image may lack a value, or have one in one of the tables.

    Args:
        argument: the name of the argument that chose the column, for messages.
        column: its name.
        tables: where to look for it.
        images: the names of the images.
        hint: what else to do if no table has the column.

    Raises:
        ValueError: no table has the column, an image has two values, or a table cannot be read as
            one; the message names the file and the line.
        OSError: a table cannot be read.
    """
    found = Column({}, [], Counter(), [])
    columns: list[dict[str, None]] = []  # of each table, in order
    by_spelling = {_spelling(name): name for name in images}
    for table in tables:
        columns.append({})
        for line, row in read_rows(table):
            where = f"{printable(table.path)} line {line}"
            columns[-1].update(dict.fromkeys(row))
            name = _row_name(table, row.get(FILE_NAME), where)
            if name not in images:
                name = by_spelling.get(_spelling(name), name)
            value = _as_text(row.get(column), where, column)
            if value is None:
                continue
            if name not in images:
                found.unknown.append(name)
                continue
            if name in found.values:
                raise ValueError(
                    f"{where}: {printable(name)} has a row with {column} already: remove one of "
                    f"them"
                )
            found.values[name] = value
            found.counts[os.path.basename(table.name).decode()] += 1
        if column in columns[-1]:
            found.tables.append(table)
    if tables and not found.tables:
        names = ", ".join(column for column in columns[0] if column != FILE_NAME)
        raise ValueError(
            f"{argument}={column} is no column of {printable(tables[0].path)}, which has: "
            f"{names or 'none'}{hint}"
        )
    return found


def read_labels(
    column: str, tables: Sequence[TextFile], images: Sequence[bytes]
) -> tuple[list[bytes], Column]:
    """Return the class of each image from the ``label_column``, and the column.

    Raises:
        ValueError: as of ``read_column``, or there is no table, or images have no value.
    """
    if not tables:
        raise ValueError(
            f"label_column={column} is a column of metadata.csv or metadata.jsonl, and there is "
            f"none under root=..."
        )
    found = read_column("label_column", column, tables, frozenset(images))
    missing = [name for name in images if not found.values.get(name)]
    if missing:
        kind = printable(found.tables[0].path)
        names = first_names([printable(name) for name in missing], 5)
        raise ValueError(
            f"label_column={column} has no value for {len(missing):,} of {len(images):,} images "
            f"({names}): add them to {kind}, or leave these images out with exclude=[...]"
        )
    return [found.values[name].encode() for name in images], found


def read_rows(table: TextFile) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of a table, each with the number of its line.

    Raises:
        ValueError: it is not in UTF-8, or a line is broken.
        OSError: it cannot be read.
    """
    name = printable(table.path)
    text = read_text(table)
    yield from (_csv_rows if table.name.endswith(b".csv") else _json_rows)(name, text)


def read_text(text: TextFile) -> str:
    """Return the text of a file in UTF-8, with or without a byte order mark.

    Raises:
        ValueError: it is in another encoding, or damaged in an archive.
        OSError: it cannot be read.
    """
    name = printable(text.path)
    try:
        content = text.files.read(text.path, MAX_TEXT)
    except BadImageError as error:
        raise ValueError(f"{name} cannot be read ({error})") from None
    except OSError as error:
        raise OSError(error.errno, f"{name} cannot be read ({error.strerror})") from None
    if content.startswith(UTF16):
        raise ValueError(f"{name} is in UTF-16: save it in UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        byte = content[error.start]
        raise ValueError(
            f"{name} line {line}: the byte {byte:#x} is not UTF-8: save the file in UTF-8"
        ) from None


def as_one_line(text: str) -> str:
    """Return ``text`` with single blanks for its white space, and none around it."""
    return " ".join(text.split())


def describe_unused_texts(listing: Listing, *, has_captions: bool, has_column: bool) -> list[str]:
    """Name the files of captions, labels and tables that are not used, and what would use them.

    Args:
        listing: after ``use`` of all files that are used.
        has_captions: whether captions are read.
        has_column: whether classes are read from a column.
    """
    texts = listing.texts()
    if not texts:
        return []
    reason = "" if has_captions or has_column else ", as only folders give classes"
    parts = [f"not used{reason}: {', '.join(texts)}"]
    tables = sorted(set(listing.tables) - listing.used)
    kinds = sorted({os.path.basename(table.name).decode() for table in tables})
    if not has_captions:
        sources = kinds + ["the .txt of each image"] * listing.has_text_of_image()
        if sources:
            parts.append(
                f"captions=true reads captions for a text condition from {' and '.join(sources)}"
            )
    if tables and not has_column:
        columns = [printable(name.encode()) for name in peek_columns(tables[0])]
        if columns:
            parts.append(
                f"label_column=NAME reads classes from a column of {kinds[0]}: "
                f"{first_names(columns, MAX_KINDS)}"
            )
    return ["; ".join(parts)]


def peek_columns(table: TextFile) -> list[str]:
    """Return the columns that the first lines of a table show; none if they cannot be read."""
    try:
        head = table.files.read_head(table.path, HEAD)
        line = head.decode("utf-8-sig", "replace").split("\n")[0]
        is_csv = table.path.endswith(b".csv")
        names = next(csv.reader([line])) if is_csv else list(json.loads(line))
    except (ValueError, TypeError, RecursionError, StopIteration, csv.Error):
        return []
    names = [as_one_line(str(name)) for name in names]
    return [name for name in names if name != FILE_NAME]


def _json_rows(name: str, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):  # not at other ends of lines, as in texts
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", str(error))
            raise ValueError(f"{name} line {number}: this is not JSON ({reason})") from None
        if not isinstance(row, dict):
            raise ValueError(
                f'{name} line {number}: every line must be one object, such as {{"file_name": '
                f'"1.jpg", "text": "a cat"}}'
            )
        yield number, row


def _csv_rows(name: str, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    header: list[str] = []
    try:
        for values in reader:
            if not values:
                continue
            if not header:
                header = _check_header([value.strip() for value in values], name)
                continue
            if len(values) != len(header):
                raise ValueError(
                    f"{name} line {reader.line_num}: {len(values)} values for {len(header)} "
                    f"columns; put a text with a comma in double quotes"
                )
            yield reader.line_num, dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise ValueError(f"{name} line {reader.line_num}: this is not CSV ({error})") from None


def _check_header(columns: list[str], name: str) -> list[str]:
    if FILE_NAME not in columns:
        hint = ""
        if len(columns) == 1 and (";" in columns[0] or "\t" in columns[0]):
            hint = "; separate them by commas"
        raise ValueError(
            f"{name} has no column {FILE_NAME}; its columns are: {', '.join(columns)}{hint}"
        )
    if twice := [column for column, n in Counter(columns).items() if n > 1]:
        raise ValueError(f"{name} has two columns {twice[0]}")
    return columns


def _row_name(table: TextFile, given: Any, where: str) -> bytes:
    """Return the name of the image that a row is about, under the folder that all roots are in."""
    if not isinstance(given, str) or not given:
        raise ValueError(f"{where}: there is no {FILE_NAME}")
    text = _as_unicode(given, where, FILE_NAME)
    return os.path.normpath(os.path.join(os.path.dirname(table.name), text))


def _spelling(name: bytes) -> bytes:
    """Return ``name`` as tables and files of any system spell it.

    Windows has backslashes, and macOS may write an accented letter as two characters.
    """
    if not name.isascii():
        text = name.decode("utf-8", "surrogateescape")
        name = unicodedata.normalize("NFC", text).encode("utf-8", "surrogateescape")
    return os.path.normpath(name.replace(b"\\", b"/"))


def _as_text(value: Any, where: str, column: str) -> str | None:
    if isinstance(value, int | float):
        value = json.dumps(value)
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(f"{where}: {column} must be one text, and is {json.dumps(value)[:40]}")
    _as_unicode(value, where, column)
    return as_one_line(value)


def _as_unicode(text: str, where: str, column: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where}: {column} has half a character (a lone surrogate)") from None
