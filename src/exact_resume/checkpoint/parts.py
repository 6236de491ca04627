"""The file of one process in a sharded checkpoint: its pieces of the tensors, as safetensors.

    8 bytes         the length of the header
    header          JSON: name, dtype, shape and place of each piece; padded with spaces
    bytes           of the pieces, one after another, as they are in memory

There is no pickle in it. Beside the header's usual entries, ``DCP_SHARDING_INFO`` says where each
piece begins in its tensor, as torch.distributed.checkpoint writes it, so that its
``HuggingFaceStorageReader`` reads these files, too. They are written and read here without the
package safetensors: it takes and returns whole files, and memory holds one piece at a time here.
"""

import hashlib
import json
import math
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from exact_resume.checkpoint.integrity import (
    CorruptCheckpointError,
    check_hash,
    check_size,
    classify_io_error,
)
from exact_resume.files import HashingWriter, open_durable

PART_NAME = re.compile(r"part-\d{5,}\.safetensors")
OFFSETS = "DCP_SHARDING_INFO"
BLOCK = 2**20  # bytes that are read at once of what is only hashed
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPE_OF = {name: dtype for dtype, name in DTYPES.items()}


@dataclass(frozen=True)
class Piece:
    """Where a piece of a tensor lies.

    Attributes:
        name: of the tensor.
        dtype: of the tensor.
        offsets: index in the tensor of the piece's first element.
        sizes: shape of the piece.
        start: of its bytes, counted from the end of the header.
        end: of its bytes.
    """

    name: str
    dtype: torch.dtype
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int
    end: int


def part_name(rank: int) -> str:
    """Return the name of the file of process ``rank``."""
    return f"part-{rank:05d}.safetensors"


def write_part(
    path: Path, pieces: Sequence[tuple[str, Sequence[int], Tensor]]
) -> dict[str, str | int]:
    """Write the pieces of one process durably.

    Args:
        path: of the new file.
        pieces: name, offsets and tensor of each.

    Returns:
        the file's ``bytes`` and ``sha256``.

    Raises:
        TypeError: if safetensors has no name for the dtype of a tensor.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, _, tensor in pieces:
        if tensor.dtype not in DTYPES:
            raise TypeError(
                f"{name} is of {tensor.dtype}, which a part of a checkpoint cannot hold"
            )
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    offsets = {name: {"saved_offsets": list(first)} for name, first, _ in pieces}
    metadata = {"format": "pt", "DCP_VERSION": "1.0", OFFSETS: json.dumps(offsets)}
    text = json.dumps({"__metadata__": metadata} | header).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    with open_durable(path) as file:
        hashing = HashingWriter(file)
        hashing.write(struct.pack("<Q", len(text)))
        hashing.write(text)
        for _, _, tensor in pieces:
            hashing.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return {"bytes": hashing.size, "sha256": hashing.sha256.hexdigest()}


def list_pieces(path: Path, expected: Mapping[str, Any]) -> list[Piece]:
    """Return what the header of a part says, in the order of the bytes; they are not read.

    Args:
        path: of the part.
        expected: its ``bytes`` and ``sha256``.

    Raises:
        CorruptCheckpointError: if the size of the file or its header is wrong.
    """
    try:
        check_size(path, expected)
        with path.open("rb") as file:
            return _parse_header(path.name, _read_header(file, expected), expected)
    except OSError as error:
        raise classify_io_error(path.name, error) from None


def read_part(
    path: Path, expected: Mapping[str, Any], receivers: Mapping[str, Callable[[Tensor], None]]
) -> None:
    """Read a part once, from its first byte to its last, and hand over the pieces that are wanted.

    The bytes that are handed over are the bytes that are hashed. Memory holds one piece at a time.

    Args:
        path: of the part.
        expected: its ``bytes`` and ``sha256``.
        receivers: called with the piece of this name, which is valid until they return.

    Raises:
        CorruptCheckpointError: if the file does not match ``expected``. Pieces that were handed
            over must then not be used.
    """
    hashing = hashlib.sha256()
    try:
        check_size(path, expected)
        with path.open("rb") as file:
            header = _read_header(file, expected)
            hashing.update(header)
            for piece in _parse_header(path.name, header, expected):
                size = piece.end - piece.start
                if piece.name not in receivers:
                    _hash_only(file, size, hashing)
                    continue
                content = _read_exactly(file, size, path.name)
                hashing.update(content)
                tensor = torch.frombuffer(content, dtype=piece.dtype).view(piece.sizes)
                receivers[piece.name](tensor)
    except OSError as error:
        raise classify_io_error(path.name, error) from None
    check_hash(path.name, hashing.hexdigest(), expected)


def _read_header(file: IO[bytes], expected: Mapping[str, Any]) -> bytearray:
    """Return the length of the header, and the header."""
    start = _read_exactly(file, 8, file.name)
    length = struct.unpack("<Q", start)[0]
    if length > expected["bytes"] - 8:
        raise CorruptCheckpointError(f"{Path(file.name).name} has a damaged header")
    return start + _read_exactly(file, length, file.name)


def _parse_header(name: str, header: bytearray, expected: Mapping[str, Any]) -> list[Piece]:
    try:
        entries = json.loads(bytes(header[8:]))
        offsets = json.loads(entries.pop("__metadata__")[OFFSETS])
        pieces = [
            Piece(
                key,
                DTYPE_OF[entry["dtype"]],
                tuple(map(int, offsets[key]["saved_offsets"])),
                tuple(map(int, entry["shape"])),
                *map(int, entry["data_offsets"]),
            )
            for key, entry in entries.items()
        ]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CorruptCheckpointError(f"{name} has a damaged header ({error})") from None
    pieces.sort(key=lambda piece: piece.start)
    if not _fill_the_file(pieces, expected["bytes"] - len(header)):
        raise CorruptCheckpointError(f"{name} has a damaged header (its pieces do not fill it)")
    return pieces


def _fill_the_file(pieces: Iterable[Piece], size: int) -> bool:
    """Return whether the pieces follow each other from the first byte to the last."""
    position = 0
    for piece in pieces:
        is_shape = len(piece.sizes) == len(piece.offsets) and min(piece.sizes, default=1) > 0
        length = math.prod(piece.sizes) * piece.dtype.itemsize
        if not is_shape or piece.start != position or piece.end - piece.start != length:
            return False
        position = piece.end
    return position == size


def _read_exactly(file: IO[bytes], size: int, name: str) -> bytearray:
    content = bytearray(size)
    view = memoryview(content)
    filled = 0
    while filled < size:
        read = file.readinto(view[filled:])  # type: ignore[attr-defined]
        if not read:
            raise CorruptCheckpointError(f"{Path(name).name} ends too early")
        filled += read
    return content


def _hash_only(file: IO[bytes], size: int, hashing: "hashlib._Hash") -> None:
    while size:
        content = _read_exactly(file, min(size, BLOCK), file.name)
        hashing.update(content)
        size -= len(content)
