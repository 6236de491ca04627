"""Stable Diffusion as a folder of diffusers: a folder with a config and weights for each part."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from typing_extensions import override

from exact_resume.weights_file import open_weights
from sturdy.pretrained.parts import (
    CLASSES,
    Base,
    UnusableBaseError,
    complete_config,
    text_part,
)
from sturdy.pretrained.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

SCHEDULER = "scheduler/scheduler_config.json"
# Of all published bases, and of schedule=scaled_linear. Under another one a time means other noise.
BETAS = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
}
PREDICTIONS = {"epsilon": "noise", "v_prediction": "v"}
# Names of the weights of a part, the best first: by diffusers, by transformers of today and before.
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
VARIANTS = ("", ".fp16")
SUFFIXES = (".safetensors", ".bin")
# What diffusers called the attention of an autoencoder until version 0.17.
OLD_ATTENTION = {
    ".query.": ".to_q.",
    ".key.": ".to_k.",
    ".value.": ".to_v.",
    ".proj_attn.": ".to_out.0.",
}


class Folder(Base):
    """A pipeline of diffusers, or one of its parts alone.

    Args:
        path: of the folder.
        folders: of each part.
        family: as of ``Base``.
        prediction: as of ``Base``.
        zero_snr: as of ``Base``.
    """

    def __init__(self, path: Path, folders: dict[str, Path], **found: Any) -> None:
        super().__init__(path, folders, **found)
        self.folders = folders

    @override
    def config(self, part: str) -> dict[str, Any]:
        return complete_config(part, read_config(part, self.folders[part]))

    @override
    def read(self, part: str) -> Mapping[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for file in find_weights(self.folders[part]):
            tensors |= open_weights(file).tensors
        if part == "vae":
            return {_rename_attention(name): tensor for name, tensor in tensors.items()}
        return tensors

    @override
    def tokenizer(self, number: int = 0) -> CLIPTokenizer:
        folder = self.path / text_part(number).replace("text_encoder", "tokenizer")
        if not folder.is_dir():
            raise UnusableBaseError(f"{self.path} misses the folder {folder.name}")
        return load_tokenizer(folder, self.config(text_part(number))["vocab_size"])


def open_folder(path: Path) -> Folder:
    """Open a pipeline of diffusers.

    Raises:
        UnusableBaseError: if it is no text-to-image pipeline of Stable Diffusion.
    """
    wanted = ["unet", "vae", text_part(0), "scheduler"]
    missing = [name for name in wanted if not (path / name).is_dir()]
    if missing:
        raise UnusableBaseError(f"{path} misses {', '.join(missing)}{_describe(path)}")
    unet = read_config("unet", path / "unet")
    if unet.get("in_channels", 4) != 4:
        raise UnusableBaseError(
            f"{path}: its U-Net takes {unet['in_channels']} channels (inpainting, depth, ...), not "
            f"4: give a text-to-image model"
        )
    is_sdxl = (path / text_part(1)).is_dir()
    if is_sdxl:
        wanted.append(text_part(1))
    # Versions 1 and 2 are told apart by this, as their text encoders were exchanged at times.
    family = "sdxl" if is_sdxl else "sd2" if unet.get("use_linear_projection") else "sd1"
    scheduler = read_json(path / SCHEDULER)
    word = scheduler.get("prediction_type", "epsilon")  # not in old files, which predict noise
    if word not in PREDICTIONS:
        raise UnusableBaseError(
            f"{path / SCHEDULER}: prediction_type {word} is not supported, only "
            f"{' and '.join(PREDICTIONS)}"
        )
    for key, expected in BETAS.items():
        if scheduler.get(key, expected) != expected:
            raise UnusableBaseError(
                f"{path / SCHEDULER}: {key} {scheduler[key]} is not supported, only {expected}"
            )
    folders = {part: path / part for part in wanted if part != "scheduler"}
    for part, folder in folders.items():
        read_config(part, folder)
        find_weights(folder)
    zero_snr = bool(scheduler.get("rescale_betas_zero_snr", False))
    return Folder(path, folders, family=family, prediction=PREDICTIONS[word], zero_snr=zero_snr)


def open_autoencoder_folder(path: Path) -> Folder:
    """Open the autoencoder of a pipeline, or one alone.

    Raises:
        UnusableBaseError: if there is none.
    """
    folder = path / "vae" if (path / "vae").is_dir() else path
    read_config("vae", folder)
    find_weights(folder)
    return Folder(path, {"vae": folder})


def read_config(part: str, folder: Path) -> dict[str, Any]:
    """Return ``config.json`` of ``part``.

    Raises:
        UnusableBaseError: if it is missing, is no JSON, or is of another class.
    """
    config = read_json(folder / "config.json")
    kinds = [config.get("_class_name"), *(config.get("architectures") or [])]
    if any(kinds) and CLASSES[part] not in kinds:
        kind = ", ".join(filter(None, kinds))
        raise UnusableBaseError(f"{folder} holds {kind}; {part} must be {CLASSES[part]}")
    return config


def read_json(path: Path) -> dict[str, Any]:
    """Return the dict in a file of JSON.

    Raises:
        UnusableBaseError: if it is missing or no JSON.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise UnusableBaseError(f"{path} is missing: get the complete folder") from None
    except ValueError as error:
        raise UnusableBaseError(f"{path} cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise UnusableBaseError(f"{path} holds no config")
    return content


def find_weights(folder: Path) -> list[Path]:
    """Return the files of the weights in ``folder``: one, or all that an index names.

    Full precision comes before float16, and safetensors before ``.bin``.

    Raises:
        UnusableBaseError: if there are none, or one of several is missing.
    """
    for variant in VARIANTS:
        for suffix in SUFFIXES:
            for stem in STEMS:
                file = folder / f"{stem}{variant}{suffix}"
                if file.is_file():
                    return [file]
                # diffusers wrote the variant at either place.
                for name in (f"{stem}{suffix}.index{variant}.json", f"{file.name}.index.json"):
                    if (folder / name).is_file():
                        return _read_index(folder / name)
    raise UnusableBaseError(
        f"{folder} holds no weights: get {STEMS[0]}.safetensors or model.safetensors"
    )


def _read_index(index: Path) -> list[Path]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UnusableBaseError(f"{index} lists no files (weight_map)")
    files = []
    for name in sorted(set(names.values())):
        file = index.with_name(Path(str(name)).name)  # never a file of another folder
        if not file.is_file():
            raise UnusableBaseError(f"{index} names {file.name}, which is missing: get it as well")
        files.append(file)
    return files


def _rename_attention(name: str) -> str:
    for old, new in OLD_ATTENTION.items():
        name = name.replace(old, new)
    return name


def _describe(path: Path) -> str:
    """Return what the folder is instead of a pipeline of Stable Diffusion, as far as it says so."""
    if snapshots := sorted(path.glob("snapshots/*/")):  # a cache of the hub
        return f": give {snapshots[-1]}"
    for file in ("model_index.json", "config.json"):
        if (path / file).is_file():
            kind = read_json(path / file).get("_class_name")
            if kind and file == "config.json":
                return f": it is {kind} alone; give the folder above"
            if kind:
                return f": it is {kind}; give a Stable Diffusion 1, 2 or XL"
    return ": give a folder of diffusers with model_index.json, or a single file of weights"
