"""Build CLIP's tokenizer from its merges.

A tokenizer cuts a text into words and joins the bytes of each word into tokens, pair by pair, in
the order of a list of merges. A single file of weights has no tokenizer, hence this module.
"""

from __future__ import annotations

import gzip
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

MERGES_FILE = "bpe_simple_vocab_16e6.txt.gz"  # as OpenAI published it with CLIP
MERGES_USED = 49_408 - 2 * 256 - 2  # the file has more; CLIP has 49,408 tokens
TEXT_LENGTH = 77  # tokens that CLIP reads, the marks of start and end included


def find_merges() -> Path | None:
    """Return CLIP's file of merges from the package open-clip-torch, None without the package."""
    package = find_spec("open_clip")  # finds the folder and imports nothing
    if package is None or package.origin is None:
        return None
    path = Path(package.origin).with_name(MERGES_FILE)
    return path if path.is_file() else None


def read_merges(path: Path) -> list[tuple[str, str]]:
    """Return the merges of CLIP out of its file.

    Raises:
        ValueError: if the file is another one, naming it.
    """
    try:
        lines = gzip.decompress(path.read_bytes()).decode().split("\n")[1 : MERGES_USED + 1]
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as {MERGES_FILE}: {error}") from error
    pairs = [line.split() for line in lines]
    if len(pairs) != MERGES_USED or any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"{path} is not {MERGES_FILE}, which has one pair of tokens a line")
    return [(first, second) for first, second in pairs]


def build_tokenizer(merges: list[tuple[str, str]], pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """Return the tokenizer with these merges; without any, a token is a byte.

    Args:
        merges: pairs of tokens that are joined, the first first.
        pad: the token that fills a short text. The second text encoder of SDXL and the one of
            Stable Diffusion 2 were trained with ``!``.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())  # one for each byte
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    tokens += [first + second for first, second in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    numbers = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(
        vocab=numbers,
        merges=merges,  # type: ignore[arg-type]  # it takes pairs, too
        pad_token=pad,
        model_max_length=TEXT_LENGTH,
    )


def load_tokenizer(folder: Path, tokens: int) -> CLIPTokenizer:
    """Return the tokenizer in ``folder``, as transformers wrote it.

    Args:
        folder: of any version of transformers.
        tokens: that the text encoder knows.

    Raises:
        ValueError: if there is none, or if it has more tokens than the text encoder.
    """
    from transformers import CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise many kinds
        reason = str(error).splitlines()[0]
        raise ValueError(f"{folder} holds no tokenizer of CLIP ({reason})") from None
    if len(tokenizer) > tokens:
        raise ValueError(
            f"{folder} has {len(tokenizer)} tokens, and its text encoder knows {tokens}: they are "
            f"of different models"
        )
    return tokenizer
