"""Networks in TorchScript files: find, hash and load them, and prepare images for them."""

import hashlib
import warnings
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F


def require_file(path: str | None, option: str, key: str, how_to_get: str) -> Path:
    """Return the file that ``key=path`` gives to ``option``, such as ``features=inception``.

    Raises:
        ValueError: if it does not exist, with ``how_to_get`` and the alternative.
    """
    file = Path(path or "").expanduser()
    if path and file.is_file():
        return file
    missing = f"{key}={path} is not there" if path else f"{key} is not given"
    raise ValueError(
        f"{option} needs a file of weights, and {missing}: {how_to_get}, and give {key}=FILE. "
        f"Or use {option.partition('=')[0]}=embedded, which needs no download"
    )


def file_digest(file: Path) -> str:
    """Return the SHA-256 of the content of ``file``, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def load_torchscript(file: Path, option: str) -> torch.jit.ScriptModule:
    """Load the network in ``file`` on the CPU, in eval mode.

    Raises:
        ValueError: naming ``option``, if the file holds none.
    """
    try:
        with warnings.catch_warnings():
            # TorchScript is deprecated, but these weights are distributed in it.
            warnings.simplefilter("ignore")
            return torch.jit.load(file, map_location="cpu").eval()
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{option}: {file} is not a TorchScript file that can be read ({reason})"
        ) from None


def for_imagenet(images: Tensor, size: int) -> Tensor:
    """Resize and normalise images as networks for ImageNet expect them.

    Args:
        images: ``(b, 3, h, w)`` in [0, 1].
        size: height and width of the result, ``(b, 3, size, size)``.
    """
    images = F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    mean = torch.tensor([0.485, 0.456, 0.406], device=images.device)[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225], device=images.device)[:, None, None]
    return (images - mean) / std
