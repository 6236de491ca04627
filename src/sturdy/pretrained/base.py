"""Open a pretrained Stable Diffusion: a folder of diffusers or a single file, never the network."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

from exact_resume.weights_file import WeightsFile, open_weights
from sturdy.pretrained.folder import open_autoencoder_folder, open_folder
from sturdy.pretrained.parts import Base, UnusableBaseError, hash_tensors
from sturdy.pretrained.single_file import UNET, AutoencoderFile, SingleFile

__all__ = ["Base", "UnusableBaseError", "hash_tensors", "open_autoencoder", "open_base"]

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # OWNER/NAME
WEIGHTS_SUFFIXES = (".safetensors", ".ckpt", ".bin", ".pt", ".pth")


def open_base(path: Path | str) -> Base:
    """Open a Stable Diffusion 1, 2 or XL. Tensors are read when they are asked for.

    Args:
        path: a folder of diffusers, or a single file: ``.safetensors`` or ``.ckpt``.

    Raises:
        ValueError: if it is no such model, or a part of it is missing; with the file.
        OSError: if it cannot be read.
    """
    found = _find(path)
    return open_folder(found) if found.is_dir() else SingleFile(_open_file(found))


def open_autoencoder(path: Path | str, scaling_factor: float | None = None) -> Base:
    """Open the autoencoder alone, the part "vae".

    Args:
        path: as of ``open_base``; or the folder or file of an autoencoder alone.
        scaling_factor: what latents are multiplied by. Only for the file of an autoencoder alone,
            which does not say it.

    Raises:
        ValueError: if there is none.
        OSError: if it cannot be read.
    """
    found = _find(path)
    if found.is_dir():
        return open_autoencoder_folder(found)
    file = _open_file(found)
    if not any(name.startswith(UNET) for name in file.tensors):
        return AutoencoderFile(file, scaling_factor)
    base = SingleFile(file)
    base.parts = ("vae",)
    return base


def _open_file(path: Path) -> WeightsFile:
    """Open a file, which a start asks for several times: its checksums are read once."""
    status = path.stat()
    return _open_unchanged(path.resolve(), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=2)
def _open_unchanged(path: Path, size: int, mtime_ns: int) -> WeightsFile:
    return open_weights(path)


def _find(path: Path | str) -> Path:
    """Return the file or folder.

    Raises:
        UnusableBaseError: if it is not there; with the command that downloads a name of the hub.
    """
    found = Path(path).expanduser()
    if found.exists():
        return found
    if HUB_ID.fullmatch(str(path)) and found.suffix not in WEIGHTS_SUFFIXES:
        name = Path(path).name
        raise UnusableBaseError(
            f"{path} is not there. If it is a model of the Hugging Face hub, download it once: "
            f"hf download {path} --local-dir {name}, and give the folder {name}"
        )
    raise UnusableBaseError(f"{path} is not there: give a file of weights or a folder of diffusers")
