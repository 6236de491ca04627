"""A cache on disk for tensors that take minutes to compute.

    tensors = cached(folder, "features", (digest, size, version), compute)

The name of a file contains a hash of everything that its tensors depend on. A file begins with the
SHA-256 of the rest, so a damaged file, which ``torch.load`` would not always notice, is computed
again.
"""

import hashlib
import io
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from exact_resume.files import atomic_write

Tensors = dict[str, Tensor]
DIGEST_BYTES = 32


def cached(
    folder: Path, name: str, depends: tuple[object, ...], compute: Callable[[], Tensors]
) -> Tensors:
    """Return the result of ``compute``, from its file if there is one.

    Args:
        folder: is made if it does not exist.
        name: the readable part of the file's name; the hash follows it.
        depends: primitives that the tensors are a function of, with a version number of the code.
        compute: called without arguments.
    """
    digest = hashlib.sha256(repr(depends).encode()).hexdigest()[:32]
    path = folder / f"{name}-{digest}.pt"
    tensors = _read(path)
    if tensors is None:
        tensors = compute()
        _write(path, tensors)
    return tensors


def _write(path: Path, tensors: Tensors) -> None:
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    content = buffer.getvalue()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, durable=False, unique=True) as file:
        file.write(hashlib.sha256(content).digest())
        file.write(content)


def _read(path: Path) -> Tensors | None:
    """Return the tensors in ``path``; None if the file is missing or damaged."""
    if not path.is_file():
        return None
    data = path.read_bytes()
    content = data[DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != data[:DIGEST_BYTES]:
        return None
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
