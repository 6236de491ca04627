"""Quote free text in the words of a command, so that it arrives as it was typed.

Hydra's grammar gives a meaning to ``,`` ``(`` ``[`` ``2024`` and ``null``, and refuses ``~`` and
``é``; a folder's name may contain any of them. So text is quoted before Hydra reads it. Words that
are quoted already stay as they are.
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

from sturdy.cli.hydra_internals import is_quoted
from sturdy.cli.usage import UsageError

# Keys whose value is a path; ``~`` is expanded in all of them.
IMAGE_FOLDERS = ("*.root", "data_root")  # a list gives several
PATHS = (
    *IMAGE_FOLDERS,
    *("ckpt_path", "init_from", "guidance.guide", "out"),
    *("*.path", "*.directory", "*.out", "sample.image", "sample.mask"),
    *("paths.*", "data.cache"),
)
NAMES = ("name", "run")
LABELS = ("sample.label",)  # a class by its name, or by its number
PROMPTS = ("sample.prompt", "sample.negative", "prompt")  # a list gives several
LOGGERS = ("logger.*.project", "logger.*.entity", "logger.*.run_name")
TEXT = (*PATHS, *NAMES, *LABELS, *PROMPTS, *LOGGERS, "data.caption", "license")

WORD = re.compile(r"(?P<sign>\+{0,2})(?P<key>[^=]+)=(?P<value>.*)", re.DOTALL)
QUOTED = r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\""""
# One of several values: quoted, a list, or everything up to the next comma.
VALUE = re.compile(rf"(?:\s*(?:{QUOTED}|\[[^\[\]]*\])\s*|[^,]*)(?:,|$)", re.DOTALL)


def matches(key: str, patterns: Collection[str]) -> bool:
    """Return whether the dotted ``key`` matches one of ``patterns``."""
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def quote_text(word: str, parser: OverridesParser, *, multirun: bool = False) -> str:
    """Quote the text in ``key=value``.

    Args:
        word: a word of the command.
        parser: Hydra's, which decides what needs quotes.
        multirun: a comma outside quotes separates values.

    Raises:
        UsageError: if ``key`` cannot be a key.
    """
    if word.startswith("~") or not (match := WORD.fullmatch(word)):
        return word
    key, value = match["key"], match["value"]
    start = f"{match['sign']}{key}="
    if not _parse(f"{start}0", parser):
        raise UsageError(f"{word}: {key!r} is no key; write key=value, without spaces around the =")
    several = re.fullmatch(r"\[([^\[\]]*)\]", value)
    if several and matches(key, (*IMAGE_FOLDERS, *PROMPTS)) and not multirun:
        items = [_quote_value(key, item.strip(), parser) for item in split_values(several[1])]
        return f"{start}[{','.join(items)}]"
    override = _parse(word, parser)
    is_function = re.match(r"[a-z]+\(", value)  # such as choice(a,b)
    if multirun and is_function and override and override.is_sweep_override():
        return word
    values = split_values(value) if multirun else [value]
    if matches(key, TEXT):
        return start + ",".join(_quote_value(key, item, parser) for item in values)
    if override:
        return word
    return start + ",".join(i if _parse(start + i, parser) else quote(i) for i in values)


def split_values(text: str) -> list[str]:
    """Split at the commas outside quotes and lists: ``a,'b,c',[d,e]`` holds three values."""
    values = []
    position = 0
    while position <= len(text):
        match = VALUE.match(text, position)
        assert match, "the pattern matches any text"
        values.append(match[0].removesuffix(","))
        position = match.end() + (not match[0].endswith(","))
    return values


def quote(text: str) -> str:
    """Return ``text`` in the quotes of Hydra's grammar.

    ``${...}`` stays an interpolation where OmegaConf can read it.
    """
    if "${" in text:
        try:
            parse_interpolation(text)
        except GrammarParseError:
            text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    return str(QuotedString(text, Quote.single).with_quotes())


def _quote_value(key: str, value: str, parser: OverridesParser) -> str:
    if value == "null" and not matches(key, (*NAMES, "*.root")):
        return value
    if matches(key, LABELS) and re.fullmatch(r"0|-?[1-9][0-9]*", value):
        return value
    override = _parse(f"key={value}", parser)
    return value if override and is_quoted(override) else quote(value)


def _parse(word: str, parser: OverridesParser) -> Override | None:
    try:
        return parser.parse_override(word)
    except HydraException:
        return None


def expand_paths(cfg: DictConfig, keys: Iterable[str]) -> None:
    """Replace ``~`` by the home directory in those of ``keys`` that are paths."""
    for key in keys:
        if matches(key, PATHS) or matches(key.rpartition(".")[0], IMAGE_FOLDERS):
            try:
                value = OmegaConf.select(cfg, key, throw_on_missing=False)
            except OmegaConfBaseException:
                continue  # an interpolation that fails is reported by check_composed
            if isinstance(value, str) and value.startswith("~"):
                OmegaConf.update(cfg, key, os.path.expanduser(value))
