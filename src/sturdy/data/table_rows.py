"""The rows of Parquet and Arrow files: some columns whole, the files of images one at a time.

An Arrow file is mapped into memory. Of a Parquet file, the groups of rows that are read now are
kept in memory, the last few of them.
"""

import bisect
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from exact_resume.system import available_cpus
from sturdy.data.listing import printable
from sturdy.data.source import BadImageError, check_file_size

if TYPE_CHECKING:
    import pyarrow as pa

NO_BYTES = "no bytes in this row (paths are not followed; datasets' save_to_disk writes the bytes)"
ROWS_AT_ONCE = 32  # that a thread reads ahead, at most
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # of an Arrow file


class Part(NamedTuple):
    """Rows that are read together: a group of rows of a Parquet file, or a whole Arrow file."""

    file: Path
    group: int
    rows: int


class TableRows:
    """The rows of some files, which have the same columns.

    Args:
        files: of one format, Parquet or Arrow.

    Attributes:
        schema: of the first file.

    Raises:
        ValueError: a file is damaged, cut short, or not of this format, or has other columns than
            the first.
        OSError: a file cannot be read.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.parts: list[Part] = []
        self._arrow: dict[Path, pa.Table] = {}
        self._groups: OrderedDict[tuple[int, str], pa.ChunkedArray] = OrderedDict()
        self._lock = threading.Lock()
        self.schema: pa.Schema = None
        for file in files:
            with _refuses(file):
                schema = self._open(file)
            self.schema = self.schema or schema
            if not schema.equals(self.schema):
                raise ValueError(
                    f"root={printable(file)} has other columns than {files[0].name}, or "
                    f"of other types"
                )
        self._starts: list[int] = []
        self.total = 0
        for part in self.parts:
            self._starts.append(self.total)
            self.total += part.rows

    def __len__(self) -> int:
        return self.total

    def column(self, name: str, field: str = "") -> "pa.ChunkedArray":
        """Return a whole column, or one field of it; rows without a value are null."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = f"{name}.{field}" if field else name
        chunks = []
        for file in dict.fromkeys(part.file for part in self.parts):
            if file in self._arrow:
                column = self._arrow[file].column(name)
            else:
                with _refuses(file), pq.ParquetFile(file) as parquet:
                    column = parquet.read(columns=[path], use_threads=False).column(name)
            chunks += _field(column, field).chunks
        return pa.chunked_array(chunks)

    def read(self, index: int, name: str, field: str, limit: int) -> bytes:
        """Return the bytes in one row. Threads may call it at once.

        Raises:
            BadImageError: there are none, more than ``limit``, or the file is damaged there.
        """
        number = bisect.bisect_right(self._starts, index) - 1
        value = self._group(number, name, field)[index - self._starts[number]]
        if not value.is_valid:
            raise BadImageError(NO_BYTES)
        buffer = value.as_buffer()
        check_file_size(buffer.size, limit)
        return bytes(buffer)

    def _open(self, file: Path) -> "pa.Schema":
        """Add the parts of ``file``, and return its columns."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if file.suffix == ".arrow":
            with pa.memory_map(os.fspath(file)) as memory:
                table = pa.ipc.open_stream(memory).read_all()
                memory.seek(memory.size() - len(END_OF_STREAM))
                if memory.read() != END_OF_STREAM:
                    raise ValueError("no end")
            self._arrow[file] = table
            self.parts.append(Part(file, 0, table.num_rows))
            return table.schema
        with pq.ParquetFile(file) as parquet:
            groups = range(parquet.num_row_groups)
            rows = [parquet.metadata.row_group(group).num_rows for group in groups]
            self.parts += [Part(file, group, n) for group, n in zip(groups, rows, strict=True)]
            return parquet.schema_arrow

    def _group(self, number: int, name: str, field: str) -> "pa.ChunkedArray":
        """Return a column of one part."""
        import pyarrow.parquet as pq

        part = self.parts[number]
        path = f"{name}.{field}" if field else name
        with self._lock:
            if (number, path) in self._groups:
                self._groups.move_to_end((number, path))
                return self._groups[number, path]
            if part.file in self._arrow:
                column = self._arrow[part.file].column(name)
            else:
                with _damages(part.file), pq.ParquetFile(part.file) as parquet:
                    table = parquet.read_row_group(part.group, columns=[path], use_threads=False)
                    column = table.column(name)
            self._groups[number, path] = _field(column, field)
            while len(self._groups) > 2 and self._rows_kept() > ROWS_AT_ONCE * available_cpus():
                self._groups.popitem(last=False)
            return self._groups[number, path]

    def _rows_kept(self) -> int:
        """Return the number of rows in memory without those that would go next."""
        return sum(len(group) for group in list(self._groups.values())[1:])


def _field(column: Any, field: str) -> "pa.ChunkedArray":
    import pyarrow as pa
    import pyarrow.compute as pc

    if not field:
        return column
    chunks = [pc.struct_field(chunk, field) for chunk in column.chunks]  # null where the row is
    return pa.chunked_array(chunks, type=column.type.field(field).type)


@contextmanager
def _refuses(file: Path) -> Iterator[None]:
    """Turn what pyarrow raises on a damaged file into ``ValueError``."""
    try:
        yield
    except (OSError, ValueError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, f"root={printable(file)}: {error.strerror}") from None
        with open(file, "rb") as head:
            is_pointer = head.read(64).startswith(b"version https://git-lfs")
        reason = " ".join(str(error).split())[:80]
        if is_pointer:
            text = "is a Git LFS pointer, not the file: git lfs pull fetches it"
        else:
            text = f"is no whole {file.suffix} file ({reason}): copy or download it again"
        raise ValueError(f"root={printable(file)} {text}") from None


@contextmanager
def _damages(file: Path) -> Iterator[None]:
    """Turn what pyarrow raises on damaged rows into ``BadImageError``."""
    try:
        yield
    except (OSError, ValueError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise BadImageError(f"damaged in {file.name}") from None
