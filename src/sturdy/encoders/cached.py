"""Tensors that take minutes to compute, kept in a file named by a hash of all that they depend on.

    tensors = cached(folder, "features", (digest, size, version), make)

A kill at any instant leaves a whole file or none. A file begins with the SHA-256 of the rest: what
is damaged, which ``torch.load`` would not always notice, is made again.
"""

import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


def cached(
    folder: Path, name: str, depends: tuple[object, ...], make: Callable[[], Tensors]
) -> Tensors:
    """What ``make`` returns, from the file if there is one.

    Args:
        folder: made if it is not there.
        name: of the file, for people; the hash follows it.
        depends: primitives that the tensors are a function of; a version number of the code is one
            of them.
    """
    path = folder / f"{name}-{hashlib.sha256(repr(depends).encode()).hexdigest()[:32]}.pt"
    if (tensors := _read(path)) is not None:
        return tensors
    tensors = make()
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    folder.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_bytes(hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue())
    os.replace(aside, path)
    return tensors


def _read(path: Path) -> Tensors | None:
    if not path.is_file():
        return None
    content = path.read_bytes()
    digest, rest = content[:32], content[32:]
    whole = hashlib.sha256(rest).digest() == digest
    return torch.load(io.BytesIO(rest), map_location="cpu", weights_only=True) if whole else None
