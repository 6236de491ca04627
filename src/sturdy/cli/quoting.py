"""How the words of a command are read: free text arrives as it was typed.

Hydra's grammar gives a meaning to ``,`` ``(`` ``[`` ``2024`` and ``null``, and refuses ``~`` and
``é``; a folder's name may hold any of them. So text is quoted here, before Hydra reads it; words
that are quoted already stay as they are.
"""

import os
import re
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException
from omegaconf.grammar_parser import parse as parse_interpolation

# Keys whose value is a path; ``~`` is expanded in all of them.
FOLDERS = ("*.root", "data_root")  # of images: a list gives several
START = ("ckpt_path", "init_from", "guidance.guide")
FILES = ("*.path", "*.directory", "*.out", "sample.image", "sample.mask")
PATHS = (*FOLDERS, *START, *FILES, "paths.*", "data.cache")
NAMES = ("name", "run")
LABELS = ("sample.label",)  # a class by its name, or by its number
TEXT = (*PATHS, *NAMES, *LABELS, "logger.*.project", "logger.*.entity", "logger.*.run_name")

WORD = re.compile(r"(?P<sign>\+{0,2})(?P<key>[^=]+)=(?P<value>.*)", re.DOTALL)
QUOTED = r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\""""
# One of several values: quoted, a list, or whatever has no comma.
VALUE = re.compile(rf"(?:\s*(?:{QUOTED}|\[[^\[\]]*\])\s*|[^,]*)(?:,|$)", re.DOTALL)


class UsageError(Exception):
    """The command cannot be meant like this; the message says what to do."""


def among(key: str, patterns: Collection[str]) -> bool:
    """Whether the dotted ``key`` fits one of ``patterns``."""
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def readable(word: str, parser: OverridesParser, *, multirun: bool = False) -> str:
    """Quote what is text in ``key=value``, so that Hydra reads it as it was typed.

    Args:
        multirun: a comma outside quotes separates values.

    Raises:
        UsageError: if ``key`` cannot be a key.
    """
    if word.startswith("~") or not (match := WORD.fullmatch(word)):
        return word
    start, key, value = f"{match['sign']}{match['key']}=", match["key"], match["value"]
    if not _read(f"{start}0", parser):
        raise UsageError(f"{word}: {key!r} is no key; write key=value, without spaces around the =")
    if among(key, FOLDERS) and not multirun and (inner := re.fullmatch(r"\[([^\[\]]*)\]", value)):
        return f"{start}[{','.join(_text(key, item.strip(), parser) for item in split(inner[1]))}]"
    read = _read(word, parser)
    if multirun and read and read.is_sweep_override() and re.match(r"[a-z]+\(", value):
        return word  # such as choice(a,b)
    values = split(value) if multirun else [value]
    if among(key, TEXT):
        return start + ",".join(_text(key, item, parser) for item in values)
    return (
        word
        if read
        else start + ",".join(i if _read(start + i, parser) else quoted(i) for i in values)
    )


def split(text: str) -> list[str]:
    """The values of ``a,'b,c',[d,e]``: three."""
    found, at = [], 0
    while at <= len(text):
        match = VALUE.match(text, at)
        assert match
        found.append(match[0].removesuffix(","))
        at = match.end() + (not match[0].endswith(","))
    return found


def quoted(text: str) -> str:
    """``text`` as Hydra's grammar quotes it; ``${...}`` in it is filled in where it can be read."""
    if "${" in text:
        try:
            parse_interpolation(text)
        except GrammarParseError:
            text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    return str(QuotedString(text, Quote.single).with_quotes())


def _text(key: str, value: str, parser: OverridesParser) -> str:
    if value == "null" and not among(key, (*NAMES, "*.root")):
        return value
    if among(key, LABELS) and re.fullmatch(r"0|-?[1-9][0-9]*", value):
        return value
    read = _read(f"key={value}", parser)
    return value if read and isinstance(read._value, QuotedString) else quoted(value)


def _read(word: str, parser: OverridesParser) -> Override | None:
    """The override that Hydra reads in ``word``; None where it cannot."""
    try:
        return parser.parse_override(word)
    except HydraException:
        return None


def expand_paths(cfg: DictConfig, keys: Iterable[str]) -> None:
    """Put the home directory in the place of ``~`` in those of ``keys`` that are paths."""
    for key in keys:
        if among(key, PATHS) or among(key.rpartition(".")[0], FOLDERS):
            try:
                value = OmegaConf.select(cfg, key, throw_on_missing=False)
            except OmegaConfBaseException:
                continue  # what cannot be filled in is told where everything is
            if isinstance(value, str) and value.startswith("~"):
                OmegaConf.update(cfg, key, os.path.expanduser(value))
