"""Read a file of weights, wherever it comes from, without executing anything in it.

Two formats are read, and recognised by their content, not by their suffix:

    safetensors   tensors and a header of JSON. https://github.com/huggingface/safetensors
    torch         what ``torch.save`` writes since torch 1.6: a zip file with a pickle and the bytes
                  of the tensors; ``.ckpt``, ``.pt``, ``.pth`` and ``.bin``

A pickle can call any function of any module. Here ``torch.load(weights_only=True)`` reads it, which
calls nothing but what builds tensors. Files by Lightning also hold a few objects of other
libraries. A stand-in that does nothing takes the place of those that ``is_harmless`` knows by name.
Any other name refuses the file.
"""

import errno
import io
import threading
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from exact_resume.pickle_names import is_harmless, list_imports, stand_in

# What files that are no weights begin with, and what to do.
NO_WEIGHTS = {
    b"version https://git-lfs": "is a git-lfs pointer, not the weights: fetch them, git lfs pull",
    b"<": "is a web page, not weights: the download failed or needs a login",
    b"{": "is JSON, not weights: give the file of weights beside it",
    b"GGUF": "is a GGUF file, which is not read: get the weights as .safetensors",
}
ASK = "Nothing in it was executed. Ask its author for a .safetensors file, which holds only tensors"
_loading = threading.Lock()  # `safe_globals` is of the process, not of the thread


class WeightsFileError(ValueError):
    """A file cannot be read as weights; the message names it, the reason and what to do.

    Attributes:
        imports: what its pickle would import, as far as that is known.
    """

    def __init__(self, message: str, imports: list[str] | None = None) -> None:
        super().__init__(message)
        self.imports = imports or []


@dataclass(frozen=True)
class WeightsFile:
    """The content of a file of weights.

    Attributes:
        path: of the file.
        format: ``safetensors`` or ``torch``.
        metadata: of safetensors, as it stands in the file; of torch, the texts and numbers beside
            the tensors.
        tensors: under the names in the file, mapped from it: their bytes are read when they are
            used. An entry ``state_dict`` is unpacked; the names of other nested dicts are joined by
            dots.
        imports: what its pickle would import beyond tensors, sorted; stand-ins took its place.
        step: the entry ``global_step``, where it is an integer.
        entries: what the file holds beside a ``state_dict``.
    """

    path: Path
    format: str
    metadata: dict[str, str]
    tensors: Mapping[str, Tensor]
    imports: list[str] = field(default_factory=list)
    step: int | None = None
    entries: list[str] = field(default_factory=list)


def open_weights(path: Path | str) -> WeightsFile:
    """Read the weights in ``path``; nothing in it is executed.

    A torch file is checked against its checksums, so it is read once completely: about a second a
    gigabyte. Safetensors has no checksums: a flipped bit of a tensor is not noticed.

    Raises:
        WeightsFileError: it is damaged, is of another format, or would import an unknown name.
        OSError: it is not there, or cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        raise WeightsFileError(f"{path} is a directory: give a file of weights in it")
    if path.exists() and not path.is_file():
        raise WeightsFileError(f"{path} is no regular file")
    with path.open("rb") as file:
        start = file.read(512)
    if start[5:9] == b"\0\0\0{":  # the length of the header, 8 bytes, and the header
        return _open_safetensors(path)
    if start.startswith(b"PK\x03\x04"):
        return _open_torch(path)
    if start.startswith(b"\x80") or start[257:262] == b"ustar":
        raise _refuse_legacy(path, start)
    raise WeightsFileError(f"{path} {_describe_start(start)}")


def _open_safetensors(path: Path) -> WeightsFile:
    try:
        from safetensors import safe_open
    except ImportError:
        raise WeightsFileError(
            f"{path} is a safetensors file, and the package that reads it is not installed: "
            f"pip install safetensors"
        ) from None
    tensors = {}
    with _naming_damage(path), safe_open(path, framework="pt", device="cpu") as file:
        metadata = dict(file.metadata() or {})
        for name in file.keys():  # noqa: SIM118 - it is no dict
            tensors[name] = file.get_tensor(name)
    if not tensors:
        raise WeightsFileError(f"{path} holds no tensors")
    step = metadata.get("global_step", "")
    return WeightsFile(
        path, "safetensors", metadata, tensors, step=int(step) if step.isdecimal() else None
    )


def _open_torch(path: Path) -> WeightsFile:
    with _naming_damage(path):
        pickle = _read_pickle(path)
        with _loading:
            imports = _list_unsafe(path, pickle)
            content = _load(path, imports)
        return _unpack(path, content, imports)


@contextmanager
def _naming_damage(path: Path) -> Iterator[None]:
    """Turn whatever libraries raise about the bytes of ``path`` into ``WeightsFileError``."""
    try:
        yield
    except WeightsFileError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # as of a wrong offset
            raise
        raise WeightsFileError(
            f"{path} is damaged or cut short ({_first_line(error)}): download or copy it again"
        ) from None


def _list_unsafe(path: Path, pickle: bytes) -> list[str]:
    """Return what the ``pickle`` in ``path`` would import beyond tensors, if all is harmless."""
    try:
        imports = sorted(get_unsafe_globals_in_checkpoint(path))
    except UnpicklingError:  # torch knows only the instructions that it writes itself
        raise WeightsFileError(
            f"{path} holds a pickle that torch did not write. {ASK}",
            list_imports(io.BytesIO(pickle)),
        ) from None
    if any(not is_harmless(name) for name in imports):
        raise _refuse_imports(path, imports)
    return imports


def _load(path: Path, imports: list[str]) -> Any:
    """Return the content of a torch file, with stand-ins for ``imports``."""
    # torch takes every path with this suffix for the other format.
    is_mapped = path.suffix != ".safetensors"
    try:
        with path.open("rb") as file, safe_globals([(stand_in(name), name) for name in imports]):
            return torch.load(
                path if is_mapped else file, map_location="cpu", weights_only=True, mmap=is_mapped
            )
    except UnpicklingError as error:
        reason = _first_line(error.__context__ or error)
        raise WeightsFileError(f"{path} cannot be read ({reason}). {ASK}", imports) from None


def _read_pickle(path: Path) -> bytes:
    """Return the pickle in a torch file, after checking every byte against the checksums."""
    with zipfile.ZipFile(path) as archive:
        # All records are in one folder.
        records = {name.partition("/")[2]: name for name in archive.namelist()}
        if "constants.pkl" in records:
            raise WeightsFileError(
                f"{path} is a TorchScript program, not weights: ask for a .safetensors file"
            )
        if "data.pkl" not in records:
            raise WeightsFileError(
                f"{path} is a zip file, but not of torch: unpack it, and give a file in it"
            )
        if not any(record.CRC for record in archive.infolist()):
            return b""  # torch was told to write no checksums, and Python then reads nothing
        if broken := archive.testzip():
            raise WeightsFileError(
                f"{path} is damaged: {printable(broken)} in it does not match its checksum. "
                f"Download or copy it again"
            )
        return archive.read(records["data.pkl"])


def _unpack(path: Path, content: Any, imports: list[str]) -> WeightsFile:
    """Return the tensors in the ``content`` of a torch file, and what stands beside them."""
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise WeightsFileError(f"{path} holds a {kind}, not tensors by name", imports)
    is_nested = isinstance(content.get("state_dict"), dict)
    tensors = dict(_flatten(content["state_dict"] if is_nested else content))
    if not tensors:
        raise WeightsFileError(f"{path} holds no tensors by name", imports)
    metadata = {}
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, str | int | float):
            metadata[key] = str(value)
    step = content.get("global_step")
    return WeightsFile(
        path,
        "torch",
        metadata,
        tensors,
        imports,
        step=step if type(step) is int else None,
        entries=[str(key) for key in content if key != "state_dict"] if is_nested else [],
    )


def _flatten(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in nested dicts, each with its keys joined by dots."""
    for key, value in values.items():
        if not isinstance(key, str | int):
            continue
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value.detach()
        elif isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")


def _refuse_legacy(path: Path, start: bytes) -> WeightsFileError:
    """Return the refusal of a file that torch wrote before 1.6, or of a pickle alone."""
    if not start.startswith(b"\x80"):
        return WeightsFileError(
            f"{path} is a tar file, perhaps of torch before 0.1.10, which is not read. {ASK}"
        )
    with path.open("rb") as file:
        imports = list_imports(file)
    if any(not is_harmless(name) for name in imports):
        return _refuse_imports(path, imports)
    return WeightsFileError(
        f"{path} is of torch before 1.6, which is not read: convert it once, which executes "
        f'nothing either: python -c "import torch; '
        f"torch.save(torch.load('OLD', weights_only=True), 'NEW.ckpt')\"",
        imports,
    )


def _refuse_imports(path: Path, imports: list[str]) -> WeightsFileError:
    refused = [name for name in imports if not is_harmless(name)]
    names = ", ".join(refused[:5]) + (", ..." if len(refused) > 5 else "")
    return WeightsFileError(
        f"{path} would import {printable(names)}, which no weights need. {ASK}", imports
    )


def _describe_start(start: bytes) -> str:
    """Return what a file is that begins with ``start`` and holds no weights."""
    if not start:
        return "is empty: download or copy it again"
    for sign, what in NO_WEIGHTS.items():
        if start.lstrip().startswith(sign):
            return what
    return (
        f"is no file of weights, or its start is damaged: it begins with {start[:8]!r}. "
        f"Files of safetensors and of torch are read"
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return printable(lines[0][:200])


def printable(text: str) -> str:
    """Return ``text`` without the characters that would command a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)
