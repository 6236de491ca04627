"""Hashes of tensors, as the reader of an export computes them."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def tensor_hashes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return a SHA-256 of dtype, shape and bytes for each tensor."""
    hashes = {}
    for name, tensor in tensors.items():
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        described = f"{tensor.dtype} {list(tensor.shape)}".encode()
        hashes[name] = hashlib.sha256(described + content).hexdigest()
    return hashes
