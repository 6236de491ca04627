"""What every pretrained model is here: parts, each with a config, tensors and a hash.

unet             the network that predicts     diffusers.UNet2DConditionModel
vae              pictures <-> latents          diffusers.AutoencoderKL
text_encoder     texts -> embeddings           transformers.CLIPTextModel
text_encoder_2   the second one of SDXL        transformers.CLIPTextModelWithProjection
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

os.environ["HF_HUB_OFFLINE"] = "1"  # before the first import of diffusers: nothing is downloaded

CLASSES = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
}
# What decides a text encoder of transformers, which writes much more into its config.
TEXT_CONFIG = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "projection_dim",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "hidden_act",
    "layer_norm_eps",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
)
# transformers dropped this prefix of the names of CLIPTextModel in version 5.6.
TEXT_PREFIX = "text_model."
POSITIONS = "embeddings.position_ids"  # 0, 1, 2, ...: an entry of older files, no weight
NAMES_SHOWN = 3

log = logging.getLogger(__name__)


class UnusableBaseError(ValueError):
    """A pretrained model cannot be used; the message names the file and what to do."""


class Base(ABC):
    """A pretrained model in a file or a folder.

    Attributes:
        path: of the file or folder.
        parts: names out of ``CLASSES``.
        family: "sd1", "sd2" or "sdxl"; "" of an autoencoder alone.
        prediction: what the U-Net predicts, "noise" or "v"; None where nothing says it.
        zero_snr: whether the schedule ends in pure noise.
        notes: sentences on what was found and chosen, for people.
    """

    def __init__(
        self,
        path: Path,
        parts: Iterable[str],
        family: str = "",
        prediction: str | None = None,
        zero_snr: bool = False,
    ) -> None:
        self.path = path
        self.parts = tuple(part for part in CLASSES if part in parts)
        self.family = family
        self.prediction = prediction
        self.zero_snr = zero_snr
        self.notes: list[str] = []
        self._expected: dict[str, dict[str, Tensor]] = {}

    @abstractmethod
    def config(self, part: str) -> dict[str, Any]:
        """Return the complete config of ``part`` in primitives, defaults included."""

    @abstractmethod
    def read(self, part: str) -> Mapping[str, Tensor]:
        """Return the tensors of ``part`` as stored, under the names of diffusers."""

    @abstractmethod
    def tokenizer(self, number: int = 0) -> CLIPTokenizer:
        """Return the tokenizer of text encoder ``number``, from 0."""

    def weights(self, part: str) -> dict[str, Tensor]:
        """Return the tensors of ``part``, under the names of ``build(part).state_dict()``.

        They have the dtypes of the file, and are mapped from it.

        Raises:
            UnusableBaseError: if tensors are missing, or are there that the part does not have.
        """
        return match_tensors(self.read(part), self._empty(part), f"{part} of {self.path}")

    def build(self, part: str, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Return ``part`` as a module on the CPU with copies of its weights, in eval mode.

        This draws no random numbers.
        """
        weights = self.weights(part)
        module = make_module(part, self.config(part))
        copies = {name: tensor.to(dtype, copy=True) for name, tensor in weights.items()}
        module.load_state_dict(copies, assign=True)
        return module.requires_grad_(True).eval()

    def sha256(self, part: str) -> str:
        """Return the hash of the tensors of ``part``; the layout of the files does not count."""
        weights = self.weights(part)
        return hash_tensors({name.removeprefix(TEXT_PREFIX): weights[name] for name in weights})

    def _empty(self, part: str) -> dict[str, Tensor]:
        """Return the tensors that ``part`` must have, without content."""
        if part not in self._expected:
            config = self.config(part)
            try:
                self._expected[part] = make_module(part, config).state_dict()
            except ImportError:
                raise
            except Exception as error:  # whatever the class makes of a config that is not its own
                reason = (str(error) or type(error).__name__).splitlines()[0]
                raise UnusableBaseError(
                    f"{part} of {self.path}: {CLASSES[part]} does not take its config ({reason})"
                ) from None
        return self._expected[part]


def make_module(part: str, config: Mapping[str, Any]) -> Any:
    """Return the network of ``config`` without weights: its parameters are on the device "meta"."""
    from accelerate import init_empty_weights  # peft depends on it

    with init_empty_weights(include_buffers=False):
        if part.startswith("text_encoder"):
            from transformers import CLIPTextConfig

            return find_class(part)(CLIPTextConfig(**config))
        return find_class(part)(**config)


def find_class(part: str) -> Any:
    """Return the class of diffusers or transformers that ``part`` is."""
    if part == "unet":
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        return UNet2DConditionModel
    if part == "vae":
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        return AutoencoderKL
    import transformers

    return getattr(transformers, CLASSES[part])


def complete_config(part: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``given`` with the defaults of the class of ``part``, in primitives.

    So a config is complete, and a later version of diffusers with other defaults changes nothing.
    """
    if part.startswith("text_encoder"):
        from transformers import CLIPTextConfig

        known = CLIPTextConfig().to_dict()
        config = {name: given.get(name, known[name]) for name in TEXT_CONFIG}
    else:
        arguments = inspect.signature(find_class(part).__init__).parameters.values()
        config = {a.name: given.get(a.name, a.default) for a in arguments if a.name != "self"}
        unknown = [name for name in given if name not in config and not name.startswith("_")]
        if unknown:
            log.warning("%s: this diffusers does not know %s", part, ", ".join(unknown))
    return json.loads(json.dumps(config))


def match_tensors(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str
) -> dict[str, Tensor]:
    """Return ``tensors`` under the names and in the order of ``expected``.

    Args:
        tensors: text encoders with the prefix ``text_model.`` or without it.
        expected: with the shapes.
        where: the part and the file, for errors.

    Raises:
        UnusableBaseError: if names or shapes differ, with some of them.
    """
    found = {}
    for name, tensor in tensors.items():
        for alias in (name, name.removeprefix(TEXT_PREFIX), TEXT_PREFIX + name):
            if alias in expected:
                name = alias
                break
        found[name] = tensor
    if missing := [name for name in expected if name not in found]:
        raise UnusableBaseError(f"{where} misses {list_names(missing)}: get the complete weights")
    extra = [name for name in found if name not in expected and not name.endswith(POSITIONS)]
    if extra:
        raise UnusableBaseError(
            f"{where} has {list_names(extra)}, which its network has not: is it another model?"
        )
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            raise UnusableBaseError(
                f"{where}: {name} is {tuple(found[name].shape)}, and its config says "
                f"{tuple(tensor.shape)}"
            )
    return {name: found[name] for name in expected}


def text_part(number: int) -> str:
    """Return the name of text encoder ``number``, from 0."""
    return "text_encoder" if number == 0 else f"text_encoder_{number + 1}"


def list_names(names: Iterable[str]) -> str:
    """Return the first of ``names`` in words, and how many follow."""
    names = list(names)
    rest = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {rest} more tensors" if rest > 0 else "")


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return a SHA-256 of names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
