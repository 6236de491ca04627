"""The text encoders of a Stable Diffusion, used as its pipeline uses them.

    SD 1 and 2:  embeddings = last hidden states
    SDXL:        embeddings = both encoders' penultimate hidden states, side by side;
                 pooled = the second one's projected text

Source: ``encode_prompt`` of diffusers' StableDiffusionPipeline and StableDiffusionXLPipeline.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sturdy.pretrained.text_table import Encode, EncodedText

PARTS = ("text_encoder", "text_encoder_2")
# What changes the embeddings beside the tensors, by its name in the config of CLIP.
SETTINGS = (
    "num_attention_heads",
    "num_hidden_layers",
    "max_position_embeddings",
    "hidden_act",
    "layer_norm_eps",
    "eos_token_id",
)


class TextEncoders:
    """One text encoder, or the two of SDXL, with their tokenizers.

    Args:
        path: a folder of diffusers, or a single file.

    Attributes:
        length: tokens that are read of a text, the marks of start and end included.

    Raises:
        ValueError: there are none.
    """

    def __init__(self, path: Path) -> None:
        from sturdy.pretrained.base import open_base

        self.base = open_base(path)
        self.parts = [part for part in PARTS if part in self.base.parts]
        if not self.parts:
            raise ValueError(f"path={path} has no text encoder")
        self.configs = [self.base.config(part) for part in self.parts]
        self.length: int = min(config["max_position_embeddings"] for config in self.configs)

    @cached_property
    def sha256(self) -> str:
        """The hash of the weights; those of two encoders are joined by ``+``."""
        return "+".join(self.base.sha256(part) for part in self.parts)

    @cached_property
    def key(self) -> str:
        """A hash of weights, configs and tokenizers; the layout of the files does not count."""
        depends: list[Any] = [self.sha256]
        for number, config in enumerate(self.configs):
            depends.append([config[name] for name in SETTINGS])
            depends.append(_describe_tokenizer(self.base.tokenizer(number)))
        return hashlib.sha256(json.dumps(depends).encode()).hexdigest()

    def load(self) -> Encode:
        """Load the weights; return the function that encodes one text, on a GPU if there is one."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        tokenizers = [self.base.tokenizer(number) for number in range(len(self.parts))]
        encoders = [self.base.build(part).to(device) for part in self.parts]
        return partial(encode, tokenizers, encoders, self.length)


@torch.no_grad()
def encode(
    tokenizers: Sequence[Any], encoders: Sequence[nn.Module], length: int, text: str | None
) -> EncodedText:
    """Encode one text.

    Args:
        tokenizers: one for each encoder.
        encoders: one, or the two of SDXL.
        length: tokens that are read.
        text: None for the null caption: the empty text, and for SDXL zeros, which it was trained
            with where the caption was left out (``force_zeros_for_empty_prompt`` of diffusers).

    Raises:
        ValueError: the embeddings do not fit float16.
    """
    states = []
    pooled = None
    is_cut = False
    for tokenizer, encoder in zip(tokenizers, encoders, strict=True):
        inputs = tokenizer(
            text or "",
            padding="max_length",
            max_length=length,
            truncation=True,
            return_tensors="pt",
        )
        all_tokens = tokenizer(text or "", truncation=False, verbose=False).input_ids
        is_cut = is_cut or len(all_tokens) > length
        device = next(encoder.parameters()).device
        output = encoder(inputs.input_ids.to(device), output_hidden_states=True)
        if len(encoders) == 1:
            states.append(output.last_hidden_state)
        else:
            states.append(output.hidden_states[-2])
            pooled = getattr(output, "text_embeds", None)
    embeddings = torch.cat(states, dim=-1)[0]
    if text is None and pooled is not None:
        embeddings = torch.zeros_like(embeddings)
        pooled = torch.zeros_like(pooled)
    return EncodedText(
        _as_float16(embeddings), None if pooled is None else _as_float16(pooled[0]), is_cut
    )


def _as_float16(embedding: Tensor) -> np.ndarray:
    halved = embedding.half()
    if not halved.isfinite().all():
        raise ValueError("the text encoder gives numbers that are not finite in float16")
    return halved.cpu().numpy()


def _describe_tokenizer(tokenizer: Any) -> list[Any]:
    """Return primitives from which equal tokens follow, whatever files they were read from."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    for changing in ("truncation", "padding"):  # set by each call
        rules.pop(changing, None)
    return [rules, tokenizer.pad_token_id, tokenizer.padding_side]
