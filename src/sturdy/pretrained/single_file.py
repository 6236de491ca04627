"""Stable Diffusion in one file, with the names that its authors gave the tensors.

    model.diffusion_model.*           the U-Net; ``model_ema.*`` its average over the training
    first_stage_model.*               the autoencoder
    cond_stage_model.*                the text encoder of version 1 and 2
    conditioner.embedders.{0,1}.*     those of SDXL

diffusers renames the tensors. The configs are read off the tensors, with a few known numbers for
each family: ``known.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from torch import Tensor
from typing_extensions import override

from exact_resume.weights_file import WeightsFile
from sturdy.pretrained import known
from sturdy.pretrained.families import recognise
from sturdy.pretrained.parts import (
    TEXT_PREFIX,
    Base,
    UnusableBaseError,
    complete_config,
    list_names,
    text_part,
)
from sturdy.pretrained.tokenizer import (
    build_tokenizer,
    find_merges,
    load_tokenizer,
    read_merges,
)

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

UNET = "model.diffusion_model."
VAE = "first_stage_model."
# The text encoders of each family: of CLIP (".transformer."), or of OpenCLIP (".model.").
TEXT_ENCODERS = {
    "sd1": ("cond_stage_model.transformer.",),
    "sd2": ("cond_stage_model.model.",),
    "sdxl": ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."),
}
VAE_MODULES = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
LAYERS_PER_LEVEL = 2  # of the U-Net of every Stable Diffusion


class SingleFile(Base):
    """Stable Diffusion 1, 2 or XL in one file.

    Args:
        file: of the whole model.

    Raises:
        UnusableBaseError: if a part is missing.
        UnsupportedModelError: if it is another model.
    """

    def __init__(self, file: WeightsFile) -> None:
        found = recognise(file)
        self.file = file
        self.has_ema = found.has_ema
        self.prefixes = {"unet": UNET, "vae": VAE}
        for number, prefix in enumerate(TEXT_ENCODERS[found.family]):
            self.prefixes[text_part(number)] = prefix
        for part, prefix in self.prefixes.items():
            if not any(name.startswith(prefix) for name in file.tensors):
                raise UnusableBaseError(
                    f"{file.path} misses {part} ({prefix}*): give a file of the whole model, or "
                    f"a folder"
                )
        super().__init__(file.path, self.prefixes, found.family, found.prediction, found.zero_snr)
        self.notes.append(found.why)
        if found.has_ema:
            self.notes.append("of the U-Net the averaged weights are taken (model_ema.*)")
        self.notes.append("widths and depths are read off its tensors, the rest is of its family")
        self._tensors: dict[str, dict[str, Tensor]] = {}

    @override
    def config(self, part: str) -> dict[str, Any]:
        tensors = self.read(part)
        with _naming(f"{part} of {self.path}"):
            if part == "unet":
                pooled = self.config(text_part(1))["projection_dim"] if self.family == "sdxl" else 0
                config = known.read_unet_config(self.family, self.prediction, tensors, pooled)
            elif part == "vae":
                config = known.read_vae_config(self.family, tensors)
            else:
                number = int(part == text_part(1))
                config = known.read_text_config(self.family, number, tensors)
        return complete_config(part, config)

    @override
    def read(self, part: str) -> Mapping[str, Tensor]:
        if part not in self._tensors:
            with _naming(f"{part} of {self.path}"):
                self._tensors[part] = self._convert(part)
        return self._tensors[part]

    @override
    def tokenizer(self, number: int = 0) -> CLIPTokenizer:
        """Return the tokenizer in a folder beside the file, or CLIP's own from its merges."""
        tokens = self.config(text_part(number))["vocab_size"]
        folder = self.path.with_name(text_part(number).replace("text_encoder", "tokenizer"))
        if folder.is_dir():
            return load_tokenizer(folder, tokens)
        merges = find_merges()
        if merges is None:
            raise UnusableBaseError(
                f"{self.path} has no tokenizer, as no single file has. Type `pip install --no-deps "
                f"open-clip-torch`, which brings CLIP's, or put the folder {folder.name} of the "
                f"model beside the file"
            )
        is_openai = known.ACTIVATIONS[self.family][number] == "quick_gelu"
        tokenizer = build_tokenizer(read_merges(merges), "<|endoftext|>" if is_openai else "!")
        if len(tokenizer) != tokens:
            raise UnusableBaseError(
                f"{self.path} knows {tokens} tokens and CLIP's tokenizer {len(tokenizer)}: put the "
                f"folder {folder.name} of the model beside the file"
            )
        return tokenizer

    def _convert(self, part: str) -> dict[str, Tensor]:
        """Return the tensors of ``part`` under the names of diffusers."""
        from diffusers.loaders import single_file_utils

        prefix = self.prefixes[part]
        if part == "vae":
            return convert_vae(self.file, prefix)
        tensors = self._averaged() if part == "unet" and self.has_ema else self.file.tensors
        own = {name: tensors[name] for name in tensors if name.startswith(prefix)}
        if part == "unet":
            config: dict[str, Any] = {"layers_per_block": LAYERS_PER_LEVEL}
            if self.family == "sdxl":
                config["addition_embed_type"] = "text_time"
            convert = single_file_utils.convert_ldm_unet_checkpoint
            return _convert_all(convert, own, config, self.path)
        if prefix.endswith(".transformer."):
            renamed = single_file_utils.convert_ldm_clip_checkpoint(own)
        else:
            width = own[f"{prefix}positional_embedding"].shape[1]
            model = SimpleNamespace(config=SimpleNamespace(hidden_size=width))
            renamed = single_file_utils.convert_open_clip_checkpoint(model, own, prefix)
        # Some files lost this prefix.
        heads = (TEXT_PREFIX, "text_projection.")
        return {n if n.startswith(heads) else TEXT_PREFIX + n: t for n, t in renamed.items()}

    def _averaged(self) -> dict[str, Tensor]:
        """Return the averaged U-Net under the names of the U-Net; in the file they have no dots."""
        own = [name for name in self.file.tensors if name.startswith(UNET)]
        names = {name: "model_ema." + name.removeprefix("model.").replace(".", "") for name in own}
        if missing := [alias for alias in names.values() if alias not in self.file.tensors]:
            raise UnusableBaseError(f"{self.path} misses {list_names(missing)}: get the whole file")
        return {name: self.file.tensors[alias] for name, alias in names.items()}


class AutoencoderFile(Base):
    """An autoencoder alone in a file, with the names of Stable Diffusion's authors.

    Args:
        file: holds ``encoder.*`` and ``decoder.*``.
        scaling_factor: what latents are multiplied by; the file does not say it.

    Raises:
        UnusableBaseError: if it holds no autoencoder, or if the factor is not given.
    """

    def __init__(self, file: WeightsFile, scaling_factor: float | None) -> None:
        self.prefix = VAE if any(name.startswith(VAE) for name in file.tensors) else ""
        if f"{self.prefix}encoder.conv_in.weight" not in file.tensors:
            raise UnusableBaseError(f"{file.path} holds no autoencoder of Stable Diffusion")
        if scaling_factor is None:
            raise UnusableBaseError(
                f"{file.path} is an autoencoder alone and does not say its scaling factor: give "
                f"scaling_factor={known.VAES['sd1']['scaling_factor']} for Stable Diffusion 1 and "
                f"2, {known.VAES['sdxl']['scaling_factor']} for XL"
            )
        super().__init__(file.path, ["vae"])
        self.file = file
        self.scaling_factor = scaling_factor

    @override
    def config(self, part: str) -> dict[str, Any]:
        with _naming(f"{part} of {self.path}"):
            config = known.read_vae_config("sd1", self.read(part))
        return complete_config(part, config | {"scaling_factor": self.scaling_factor})

    @override
    def read(self, part: str) -> Mapping[str, Tensor]:
        with _naming(f"{part} of {self.path}"):
            return convert_vae(self.file, self.prefix)

    @override
    def tokenizer(self, number: int = 0) -> CLIPTokenizer:
        raise UnusableBaseError(f"{self.path} is an autoencoder alone: it has no tokenizer")


def convert_vae(file: WeightsFile, prefix: str) -> dict[str, Tensor]:
    """Return the autoencoder in ``file`` under the names of diffusers."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    starts = tuple(prefix + module for module in VAE_MODULES)  # not its loss, nor its average
    own = {name: file.tensors[name] for name in file.tensors if name.startswith(starts)}
    down = f"{prefix}encoder.down."
    levels = {name[len(down) :].split(".")[0] for name in own if name.startswith(down)}
    blocks = {"down_block_types": list(levels), "up_block_types": list(levels)}  # it counts them
    return _convert_all(convert_ldm_vae_checkpoint, own, blocks, file.path)


def _convert_all(
    convert: Callable[..., dict[str, Tensor]],
    tensors: dict[str, Tensor],
    config: dict[str, Any],
    path: Path,
) -> dict[str, Tensor]:
    """Return ``convert(tensors, config)``, which leaves out the names that it does not know.

    Raises:
        UnusableBaseError: if it left out any.
    """
    renamed = convert(tensors, config)
    used = {tensor.data_ptr() for tensor in renamed.values()}
    if extra := [name for name in tensors if tensors[name].data_ptr() not in used]:
        raise UnusableBaseError(
            f"{path} has {list_names(extra)}, which Stable Diffusion does not have: is it another "
            f"model?"
        )
    return renamed


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """Turn the error of a tensor that is missing into one with its name."""
    try:
        yield
    except KeyError as error:
        raise UnusableBaseError(
            f"{where} misses the tensor {error.args[0]}: get the complete weights"
        ) from None
