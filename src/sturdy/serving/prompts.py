"""The condition of a run with captions, for prompts that come one by one.

The text encoders stay loaded, and no prompt is written to the disk.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from sturdy.pretrained.captions import CaptionCondition, Captions
from sturdy.pretrained.text_encoders import TextEncoders
from sturdy.pretrained.text_table import EncodedText, TextTable

KEPT_PROMPTS = 256  # of which the embeddings are kept


class PromptTable(TextTable):
    """A table of text embeddings in memory.

    Args:
        prompts: the text of each row.
        rows: the embeddings of each, and of the null caption at the end.
    """

    def __init__(self, prompts: Sequence[str], rows: Sequence[EncodedText]) -> None:
        self.path = Path()
        self.digest = ""
        self.captions = list(prompts)
        self.cut = [text for text, row in zip(prompts, rows, strict=False) if row.is_cut]
        self.embeddings = np.stack([row.embeddings for row in rows])
        pooled = [row.pooled for row in rows if row.pooled is not None]
        self.pooled = np.stack(pooled) if pooled else None


class PromptEncoder:
    """Makes conditions of prompts.

    Args:
        option: of the run.
    """

    def __init__(self, option: Captions) -> None:
        self.image_size = option.image_size
        self.encode = lru_cache(KEPT_PROMPTS)(TextEncoders(option.path).load())

    def __call__(self, prompts: Sequence[str], negative: str | None) -> CaptionCondition:
        """Return the condition of ``prompts``, whose null caption is ``negative``."""
        table = PromptTable(prompts, [self.encode(text) for text in (*prompts, negative)])
        return CaptionCondition(torch.arange(len(prompts)), table, self.image_size)
